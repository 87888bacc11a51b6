"""Everything that a GPU has to show: the kernels tested natively, then measured.

    python -m benchmarks.gpu [first|second] [--record FILE] [--keep FILE] [--commit NAME] [--kernels FILE]

needs torch and Triton, timm for everything that has a model in it, pytest for the tests, and no network. Parts run in
order of worth, each in a process of its own: one that fails, hangs or takes the GPU's context with it is recorded, and
the run goes on. A contender that killed its process is left out and the case measured again. The record is written
after every contender, and a run that finds one adds to it: what was measured stays, what failed is tried again. All
processes end with this one, however it ends.

``first`` and ``second`` divide the work for a machine that is there for a quarter of an hour (docs/gpu.md); without
them all of it is done. ``python -m benchmarks.report`` makes tables of the record, ``python -m benchmarks.dispatch``
the order of the backends. ``--device cpu`` runs all of it on something tiny. The GPU's settings are left alone.
"""

import argparse
import contextlib
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import file_name, in_same_turns
from benchmarks.gpu_parts import FIRST, PARTS, ROOT, SECOND
from benchmarks.gpu_record import LOST, TAIL, OutOfTimeError, Record
from benchmarks.gpu_scope import scope_of
from effnet_kernels.benchmarking.contenders import OURS
from effnet_kernels.benchmarking.environment import commit, describe, environment
from effnet_kernels.benchmarking.tables import seconds as duration
from effnet_kernels.benchmarking.tables import speedup, text_table

# docs/gpu.md
COMMAND = (
    "python3 -m benchmarks.gpu {call} --commit {commit} --kernels build/gpu-kernels.zip"
    ' --record "${{OUT:?}}/gpu.json" --keep /var/tmp/gpu.json'
)
CALLS = {"first": (FIRST, 300.0), "second": (SECOND, 290.0)}  # parts, seconds
COMPILED = {"none": (), "default": ("compiled",), "autotuned": ("compiled", "autotuned")}
SPARE = 10.0  # seconds of the budget: Python starts before the clock does, and a page is printed behind it
MODULES = ["benchmarks.gpu_parts", "timm", "triton"]  # imported once for all parts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", nargs="?", choices=CALLS, help="a half of the run; default: all of it")
    parser.add_argument("--budget", type=float, help="seconds; default: 300 for the first call, 290 for the second")
    parser.add_argument("--only", help=f"parts, comma-separated, of {','.join(PARTS)}")
    parser.add_argument("--compiled", choices=COMPILED, default="autotuned", help="torch.compile (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", default=commit(), help="of the code, where git cannot tell")
    parser.add_argument("--record", type=Path, help="the JSON; default: benchmarks/results/<GPU>.json")
    parser.add_argument("--keep", type=Path, help="a second place for the record; the one that has more is read")
    parser.add_argument("--kernels", type=Path, help="compiled Triton kernels, by python -m benchmarks.gpu_kernels")
    parser.add_argument("--fresh", action="store_true", help="begin a new record in place of the one that is there")
    options = parser.parse_args(arguments)
    calls = [CALLS[options.call]] if options.call else list(CALLS.values())
    budget = sum(seconds for _, seconds in calls) if options.budget is None else options.budget
    until = time.time() + budget - min(SPARE, budget / 10)
    left_out = {*COMPILED["autotuned"]} - {*COMPILED[options.compiled]}
    wanted = {part for parts, _ in calls for part in parts} - left_out
    if options.only is not None:
        wanted = set(options.only.split(","))
    if unknown := wanted - PARTS.keys():
        parser.error(f"--only must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu shows that everything runs")
    if options.commit is None:
        parser.error("git cannot tell which code this is: --commit NAME")
    # Inductor moves Triton's cache when it first compiles: what was packed and compiled before would be lost to it.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))

    here = environment(options.device) | {"commit": options.commit}
    here["packed_kernels"] = os.path.relpath(options.kernels, ROOT) if options.kernels else None
    file = (options.record or ROOT / "benchmarks" / "results" / f"{file_name(here['device'])}.json").absolute()
    places = (file, options.keep and options.keep.absolute())
    with _alone(file.parent) as alone:
        if not alone:
            parser.error(f"another run is writing in {file.parent}")
        if options.fresh:
            for place in filter(None, places):
                place.unlink(missing_ok=True)
        try:
            record = Record(*places)
        except (OSError, ValueError) as error:
            parser.error(f"{error}: another --record or --keep, or --fresh")
        known = record.content["environment"]
        for what, now in _identity(here).items():
            if (then := _identity(known).get(what, now)) != now:
                read = file if file.exists() else options.keep
                parser.error(f"{read} is of {what} {then}, this is {now}: another --record or --keep, or --fresh")
        known |= here
        record.content.pop("doing", None)  # of a run that was killed
        record.save()
        if "copy_bytes_per_second" not in known:
            wanted.add("ceilings")  # shares of it are recorded with every measurement
        if options.only is None:
            done = {name for name, part in record.content["parts"].items() if part.get("status") == "done"}
            wanted -= {name for name in done if not PARTS[name].again}
        os.chdir(ROOT)  # for the imports of the processes
        run = Run(options.device, places, until, budget)
        for name in (part for part in PARTS if part in wanted):
            run.supervise(name)
        print(summary(Record(*places).content))
    return 0


def _identity(environment: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same for all that is in one record, as far as it is known."""
    versions = environment.get("versions", {})
    known = {name: environment[name] for name in ("device", "commit") if name in environment}
    return known | {name: versions[name] for name in ("torch", "triton", "timm") if name in versions}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no other process writes records here; none does as long as this one is in the ``with`` block."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


class Run:
    """The parts of one call."""

    def __init__(self, device: str, places: tuple[Path, Path | None], until: float, budget: float) -> None:
        self.device, self.places, self.until, self.budget = device, places, until, budget
        self.start = "forkserver"
        if device == "cuda" and attempt(torch.cuda.init, (), until)[0] != "done":
            self.start = "spawn"  # some import has touched the GPU, and CUDA does not survive a fork

    def supervise(self, name: str) -> None:
        """Run a part in a process of its own until it ends, or cannot go on; record how it went."""
        began = time.time()
        end = min(self.until, began + PARTS[name].share * self.budget)
        record = self.record(name)
        record.content["parts"].pop(name, None)
        record.forget_failures()
        record.save()
        status, errors = "no time left", ""
        if end - time.time() >= PARTS[name].least:
            print(f"{name} ({end - began:.0f} s at most)", flush=True)
            died = True
            while died:
                status, errors, died = attempt(run_part, (name, self.device, self.places, end), end, self.start)
                # What killed the process, or hung in it, is left out from now on.
                last = (errors.strip().splitlines() or [""])[-1]
                died = self.record(name).blame(f"{status} {last}".strip(), died) and died
        record = self.record(name)
        part = record.part(name, seconds=round(time.time() - began, 1))
        if status != "done" or "status" not in part:
            record.part(name, status=status, **({"errors": errors[-TAIL:]} if errors else {}))
        print(f"{name}: {part['status']}, {part['seconds']} s", flush=True)

    def record(self, name: str) -> Record:
        return Record(*self.places, part=name)


def attempt(
    target: Callable[..., None], arguments: tuple[Any, ...], end: float, start: str = "forkserver"
) -> tuple[str, str, bool]:
    """Call a function in another process: how it ended, what it said on stderr, and whether it died of its work.

    ``start``: how processes are. A server that has imported everything and touched no GPU forks them; Python itself,
    "spawn", takes seconds to import it anew.
    """
    context: Any = multiprocessing.get_context(start)
    context.set_forkserver_preload(MODULES)
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        process = context.Process(target=_apart, args=(log.name, target, arguments))
        process.start()
        with _ending_with_us(process.pid):
            process.join(max(1.0, end - time.time()))
            code = process.exitcode
        process.kill()  # had it no group of its own yet
        process.join()
        errors = log.read()
    if code is None:
        return "cut off", errors, False
    return ("done", "", False) if code == 0 else (f"died with status {code}", errors, code == LOST or code < 0)


def _apart(log: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what it starts has to hear it (gpu_parts._run)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 2)
    target(*arguments)


@contextlib.contextmanager
def _ending_with_us(group: int) -> Iterator[None]:
    """Kill a process group behind the ``with`` block, or when this process ends within it, by whatever signal."""
    # Its leader too, which has no group of its own until it is up. Nobody but us has the other end of the input.
    command = ["/bin/sh", "-c", 'read end; kill -s KILL "$0" "-$0"', str(group)]
    watch = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # with all that it has started
            os.killpg(group, signal.SIGKILL)
        watch.kill()
        watch.wait()
        watch.stdin.close()  # type: ignore[union-attr]


def run_part(name: str, device: str, places: tuple[Path, Path | None], end: float) -> None:
    """The part's own process, which fails by dying alone: all else is recorded."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    record = Record(*places, until=end, part=name)
    try:
        PARTS[name].run(record, scope_of(device))
        record.part(name, status="done")
    except OutOfTimeError:
        record.part(name, status="out of time")
    except Exception:
        record.part(name, status="failed", errors=traceback.format_exc()[-TAIL:])


def summary(content: dict[str, Any]) -> str:
    """The run on one page, short enough to be read where only the end of the output is kept."""
    lines = []
    for level, cases in content["levels"].items():
        ours = dict.fromkeys(name for case in cases.values() for name in case["contenders"] if name.startswith(OURS))
        rows = [_row(title, case, list(ours)) for title, case in cases.items()]
        backends = [name.removeprefix(f"{OURS} ") for name in ours]
        header = (level, "fastest other", "", *backends, "other/ours", "of copy")
        lines += ["", text_table(header, rows)] if rows else []
        lines += [
            f"  {title}: {name}: {reason[:110]}"
            for title, case in cases.items()
            for name, result in case["contenders"].items()
            if (reason := result.get("wrong") or result.get("failed"))
        ][:12]
    rows = [  # without a status: the call was killed in it
        (name, part.get("status", "killed"), f"{part.get('seconds', '?')} s", _detail(part))
        for name, part in content["parts"].items()
    ]
    lines += ["", text_table(("part", "", "time", ""), rows)]
    found = content["environment"]
    if "copy_bytes_per_second" in found:
        copy, matrix = found["copy_bytes_per_second"], found["matrix_flops_per_second"]
        lines.append(f"copy {copy / 1e9:.0f} GB/s, product {matrix / 1e12:.3g} TFLOP/s")
    lines.append(describe(found))
    return "\n".join(lines)


def _row(title: str, case: dict[str, Any], ours: list[str]) -> tuple[str, ...]:
    contenders = in_same_turns(case["contenders"])
    times = {name: result["median"] for name, result in contenders.items() if "median" in result}
    other = min((name for name in times if not name.startswith(OURS)), key=times.__getitem__, default="")
    best = min((name for name in times if name in ours), key=times.__getitem__, default="")
    ratio = speedup(contenders, best, other)
    text = f"{ratio:.2f}x" if ratio else case.get("failed", "")[-60:].strip()
    share = f"{contenders[best]['share_of_copy']:.0%}" if "share_of_copy" in contenders.get(best, {}) else ""
    cells = [_cell(contenders.get(name, {})) for name in ours]
    return (title, _cell(contenders.get(other, {})), other, *cells, text, share)


def _cell(result: dict[str, Any]) -> str:
    if "median" in result:
        return duration(result["median"])
    if "alone" in result:
        return f"~{duration(result['alone'])}"  # a single call
    return "WRONG" if "wrong" in result else "failed" if result else ""


def _detail(part: dict[str, Any]) -> str:
    if "passed" in part:
        counts = ", ".join(f"{part[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped"))
        return "\n".join((counts, *(f"    {line[:110]}" for line in part["failures"][:12])))
    if "summary" in part:
        return "; ".join(part["summary"])
    if "errors" in part:
        return (part["errors"].strip().splitlines() or [""])[-1][:150]
    return "; ".join(part[key] for key in ("packed", "reason") if part.get(key))


if __name__ == "__main__":
    sys.exit(main())
