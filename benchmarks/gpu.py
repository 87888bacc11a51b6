"""Everything that a GPU has to show, in one run: the kernels tested natively, then measured.

    python -m benchmarks.gpu [--budget SECONDS] [--only PART,PART]

needs torch and Triton, timm for everything that has a model in it, pytest for the tests, and no network. Parts run in
order of worth, each in a process of its own: one that fails, hangs or takes the GPU's context with it is recorded, and
the run goes on. A contender that killed its process is left out and the case measured again. The record,
``benchmarks/results/<GPU>.json``, is written after every measurement; a run at the same commit
adds to it and tries again what failed.
``python -m benchmarks.report`` makes tables of it, ``python -m benchmarks.dispatch`` the order of the backends.

``--device cpu`` runs all of it on something tiny, for tests. The GPU's settings are left alone.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import file_name
from benchmarks.gpu_parts import PARTS, ROOT, scope_of
from benchmarks.gpu_record import LIMIT, LOST, TAIL, OutOfTimeError, Record
from effnet_kernels.benchmarking.contenders import OURS
from effnet_kernels.benchmarking.environment import commit, cpu_model, describe, environment
from effnet_kernels.benchmarking.tables import seconds as duration
from effnet_kernels.benchmarking.tables import text_table

LEAST = 10.0  # seconds below which no part is begun


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated, of %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", default=commit(), help="of the code, where git cannot tell")
    parser.add_argument("--record", type=Path, help="the JSON; default: benchmarks/results/<GPU>.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # the process of one part
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        return run_part(options.part, options.device, Record(options.record, options.until))
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--only must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu shows that everything runs")
    until = time.time() + options.budget
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_model()
    file = options.record or ROOT / "benchmarks" / "results" / f"{file_name(device)}.json"
    record = Record(file)
    if record.content["environment"].get("commit") != options.commit:
        file.unlink(missing_ok=True)  # measured on other code
        record = Record(file)
    record.content["environment"] |= environment(options.device) | {"commit": options.commit}
    record.forget_failures()  # they are tried again, perhaps with more time
    record.save()
    if "copy_bytes_per_second" not in record.content["environment"] and "ceilings" not in wanted:
        wanted.insert(0, "ceilings")  # shares of it are recorded with every measurement
    for name in (part for part in PARTS if part in wanted):
        supervise(name, options.device, file, until, options.budget)
    print(summary(Record(file).content))
    return 0


def supervise(name: str, device: str, file: Path, until: float, budget: float) -> None:
    """Run a part in a process of its own until it ends, or cannot go on; record how it went."""
    began = time.time()
    end = min(until, began + PARTS[name][1] * budget)
    print(f"{name} ({end - began:.0f} s at most)", flush=True)
    record = Record(file)
    record.content["parts"].pop(name, None)
    record.save()
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--device", device]
    command += ["--record", str(file), "--until", str(end)]
    while True:
        if end - time.time() < min(LEAST, budget / 10):
            status, errors = "no time left", ""
            break
        status, errors, died = attempt(command, end)
        # What killed the process, or hung in it, is left out from now on.
        last = (errors.strip().splitlines() or [""])[-1]
        if not Record(file).blame(f"{status} {last}".strip(), 0.0 if died else LIMIT) or not died:
            break
    record = Record(file)
    part = record.part(name, seconds=round(time.time() - began, 1))
    if status != "done" or "status" not in part:
        record.part(name, status=status, **({"errors": errors[-TAIL:]} if errors else {}))
    print(f"  {record.content['parts'][name]['status']}, {part['seconds']} s", flush=True)


def attempt(command: list[str], end: float) -> tuple[str, str, bool]:
    """How the process ended, what it said on stderr, and whether it died of what it was doing."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, start_new_session=True)
        try:
            code = process.wait(max(1.0, end - time.time()))
            status = "done" if code == 0 else f"died with status {code}"
            died = code == LOST or code < 0
        except subprocess.TimeoutExpired:
            status, died = "cut off", False
        finally:
            with contextlib.suppress(ProcessLookupError):  # with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        errors = log.read()
    return status, "" if status == "done" else errors, died


def run_part(name: str, device: str, record: Record) -> int:
    """The part's own process: 0 even where it failed, if that is recorded."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        PARTS[name][0](record, scope_of(device))
        record.part(name, status="done")
    except OutOfTimeError:
        record.part(name, status="out of time")
    except Exception:
        record.part(name, status="failed", errors=traceback.format_exc()[-TAIL:])
    return 0


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
    rows = [(name, part["status"], f"{part['seconds']} s", _detail(part)) for name, part in content["parts"].items()]
    lines += ["", text_table(("part", "", "time", ""), rows)]
    found = content["environment"]
    if "copy_bytes_per_second" in found:
        copy, matrix = found["copy_bytes_per_second"], found["matrix_flops_per_second"]
        lines.append(f"copy {copy / 1e9:.0f} GB/s, product {matrix / 1e12:.3g} TFLOP/s")
    lines.append(describe(found))
    return "\n".join(lines)


def _row(title: str, case: dict[str, Any], ours: list[str]) -> tuple[str, ...]:
    contenders = case["contenders"]
    times = {name: result["median"] for name, result in contenders.items() if "median" in result}
    other = min((name for name in times if not name.startswith(OURS)), key=times.__getitem__, default="")
    best = min((name for name in times if name in ours), key=times.__getitem__, default="")
    cells = []
    for name in ours:
        result = contenders.get(name, {})
        failed = "WRONG" if "wrong" in result else "failed" if result else ""
        cells.append(duration(result["median"]) if "median" in result else failed)
    ratio = f"{times[other] / times[best]:.2f}x" if other and best else case.get("failed", "")[-60:].strip()
    share = f"{contenders[best]['share_of_copy']:.0%}" if "share_of_copy" in contenders.get(best, {}) else ""
    return (title, duration(times[other]) if other else "", other, *cells, ratio, share)


def _detail(part: dict[str, Any]) -> str:
    if "passed" in part:
        counts = ", ".join(f"{part[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped"))
        return "\n".join((counts, *(f"    {line[:110]}" for line in part["failures"][:12])))
    if "memcheck" in part:
        return "; ".join((*part["memcheck"], *part.get("racecheck", ())))
    if "errors" in part:
        return (part["errors"].strip().splitlines() or [""])[-1][:150]
    return part.get("reason", "")


if __name__ == "__main__":
    sys.exit(main())
