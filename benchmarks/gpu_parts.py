"""The parts of a run of ``benchmarks.gpu``, in order of worth: functions of the record, each in its own process."""

import functools
import gzip
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import effnet_kernels
from benchmarks import cases, dispatch, gpu_profile
from benchmarks.cases import Case
from benchmarks.ceilings import copy_bandwidth, matrix_rate
from benchmarks.gpu_record import TAIL, OutOfTimeError, Record
from benchmarks.gpu_scope import Scope
from benchmarks.training_step import build as training_step
from effnet_kernels import native, tuning
from effnet_kernels.benchmarking import contenders
from effnet_kernels.benchmarking.contenders import AUTOTUNED, CHANNELS_LAST, COMPILED, ours

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 1  # of the search for tiles: those that ``gpu_kernels --tune`` compiles


CUT_OFF = "\ncut off: out of time\n"  # the end of what a tool printed that had no time to end itself


def available(backends: Sequence[str]) -> list[str]:
    """Those of the backends that there are."""
    known = effnet_kernels.backends()
    return [name for name in backends if known[name][0]]


def names(eager: Sequence[str], backends: Sequence[str]) -> list[str]:
    """The contenders: baselines, and ours on those backends that there are."""
    return [*eager, *map(ours, available(backends))]


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, if it is installed."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which(name) or shutil.which(home / "bin" / name)


# ---- the code itself: built, right, clean -------------------------------------------------------------------


def build(record: Record, scope: Scope) -> None:
    """What was brought along: packed Triton kernels, and the CUDA library, compiled here where it does not serve."""
    packed = record.content["environment"].get("packed_kernels")
    if packed:
        from effnet_kernels import precompile

        began = time.time()
        try:
            found = f"{precompile.unpack(Path(packed))} kernels unpacked in {time.time() - began:.1f} s"
        except Exception as error:  # they are compiled when they are first used
            found = contenders.failure(error)
        record.part("build", packed=found)
    available, reason = native.cuda_available() if scope.device == "cuda" else native.cpu_available()
    if not available and scope.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        architecture = f"{major}.{minor}{'a' * (major >= 9)}"
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        output = _run(record, command, TORCH_CUDA_ARCH_LIST=architecture)
        record.part("build", built_for=architecture, output=output[-TAIL:])
        # What this process has found out about the library it keeps.
        ask = "from effnet_kernels import native; print(native.cuda_available()[1])"
        reason = _run(record, [sys.executable, "-c", ask]).strip()
    record.part("build", reason=reason)


def ceilings(record: Record, scope: Scope) -> None:
    """What this device can do at best, measured."""
    measured = {
        "copy_bytes_per_second": copy_bandwidth(scope.device, scope.copy_bytes),
        "matrix_flops_per_second": matrix_rate(cases.DTYPES[scope.dtype], scope.device, scope.matrix),
    }
    record.content["environment"] |= measured
    for of in record.content["levels"].values():
        for entry in of.values():
            for name, result in list(entry["contenders"].items()):
                cases.put(entry, name, result, measured["copy_bytes_per_second"])
    record.part("ceilings", backends={name: list(found) for name, found in effnet_kernels.backends().items()})


def tests(record: Record, scope: Scope) -> None:
    """``pytest -m gpu``: the kernels natively. Without a GPU they are only collected."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", "--exhaustive", "-m", "gpu"]
    # The tuner compiles hundreds of tiles one after the other, and its own tests run anywhere.
    command += ["tests/gpu", "tests/cuda", "tests/triton", "--ignore", "tests/triton/test_tuner.py"]
    if scope.device == "cpu":
        command += ["--collect-only", "-q"]
    else:
        command += ["-v"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(14, os.cpu_count() or 1))]  # most of the time goes into compiling
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout", "60"]  # a kernel that hangs
    # In narrow columns pytest leaves out why a test has failed.
    output = _run(record, command, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", COLUMNS="300")
    record.part("tests", **outcome(output))
    if output.endswith(CUT_OFF):
        raise OutOfTimeError


def outcome(output: str) -> dict[str, Any]:
    """What ``pytest -v`` said, with or without pytest-xdist, be it to the end or until it was cut off."""
    kinds = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", output.split("short test summary")[0])
    failures = re.findall(r"^(?:FAILED|ERROR) (.{1,300})", output, re.MULTILINE)  # of the summary, with reasons
    failures = failures or re.findall(r"(?:FAILED|ERROR) (tests/\S+)|(tests/\S+) (?:FAILED|ERROR)", output)
    counts = {kind.lower(): kinds.count(kind) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    last = (output.strip().splitlines() or [""])[-1]
    return {**counts, "failures": ["".join(found) for found in failures][:100], "last_line": last}


def memcheck(record: Record, scope: Scope) -> None:
    """compute-sanitizer over one small call of every CUDA kernel: memory."""
    _sanitize(record, scope, "memcheck")


def racecheck(record: Record, scope: Scope) -> None:
    """The same, races."""
    _sanitize(record, scope, "racecheck")


def _sanitize(record: Record, scope: Scope, check: str) -> None:
    tool = cuda_tool("compute-sanitizer")
    if tool is None or scope.device == "cpu":
        record.part(check, reason="there is no compute-sanitizer" if tool is None else "there is no GPU")
        return
    command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
    command += ["-p", "no:cacheprovider", "tests/gpu", "-k", "many_runs and cuda"]
    # An allocation each, or a write beyond a tensor would land in another one of torch's block.
    output = _run(record, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="1")
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*|\d+ passed.*|\d+ failed.*", output)
    findings = [line for line in output.splitlines() if line.startswith("=========")]
    record.part(check, summary=summary, findings=findings[:40])


# ---- measurements -------------------------------------------------------------------------------------------


def flagship(record: Record, scope: Scope) -> None:
    """The headline: B0, a large batch."""
    record.measure(scope.flagship_case(), names(scope.eager, scope.whole), scope.seconds)


def blocks(record: Record, scope: Scope) -> None:
    """Whole blocks; the order of the backends for ``mbconv`` comes from them alone."""
    _measure(record, scope, scope.block_cases(), names([CHANNELS_LAST], scope.whole))


def ops(record: Record, scope: Scope) -> None:
    """Every kind of kernel beside the bandwidth of a copy."""
    _measure(record, scope, scope.op_cases(), names([CHANNELS_LAST], scope.backends))


def models(record: Record, scope: Scope) -> None:
    """Whole networks, one forward pass."""
    _measure(record, scope, scope.model_cases(), names(scope.eager, scope.networks))


def training(record: Record, scope: Scope) -> None:
    """Training steps of whole networks: time and peak memory."""
    _measure(record, scope, scope.training_cases(), names(scope.eager, scope.networks))


def compiled(record: Record, scope: Scope) -> None:
    """torch.compile beside what was measured before."""
    _measure(record, scope, scope.compiled_cases(), [COMPILED])


def autotuned(record: Record, scope: Scope) -> None:
    """The flagship once more, torch.compile measuring its own choices."""
    _measure(record, scope, [next(scope.compiled_cases())], [AUTOTUNED])


def _measure(record: Record, scope: Scope, wanted: Iterable[Case], contenders: Sequence[str]) -> None:
    """A case for which there is no time does not keep smaller ones behind it from being measured."""
    late = False
    for case in wanted:
        try:
            record.measure(case, contenders, scope.seconds)
        except OutOfTimeError:
            late = True
    if late:
        raise OutOfTimeError


def launches(record: Record, scope: Scope) -> None:
    """Every launch of the flagship, of the other models at large batches and of a training step, with its time."""
    found: dict[str, dict[str, list[str]]] = {}
    for case in scope.large_cases():
        stock, x = (thing.to(memory_format=torch.channels_last) for thing in case.make())
        for backend in available(scope.whole[:2]):
            model = contenders.patched(stock, backend)
            with torch.inference_mode():
                found.setdefault(case.title, {})[ours(backend)] = gpu_profile.launches(functools.partial(model, x))
            record.part("launches", launches=found)
    case = next(scope.training_cases())
    stock, x = case.make()
    for name in names((), scope.networks):
        step = training_step(name, stock, x, case.amp, contenders.patched)
        found.setdefault(f"{case.title}, training", {})[name] = gpu_profile.launches(step)
        record.part("launches", launches=found)


def counters(record: Record, scope: Scope) -> None:
    """Nsight Compute over the kernels of the ops and of some blocks; its pages lie beside the record."""
    tool = cuda_tool("ncu")
    if tool is None or scope.device == "cpu":
        record.part("counters", reason="there is no Nsight Compute" if tool is None else "there is no GPU")
        return
    report = record.file.with_suffix(".ncu-rep")
    output = _run(record, gpu_profile.command(tool, report, record.until - 40))  # both pages take time, too
    titles = [line.removeprefix("counted: ") for line in output.splitlines() if line.startswith("counted: ")]
    for page in ("raw", "source"):
        command = gpu_profile.reading(tool, report, page)
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=record.left()).stdout
        with gzip.open(record.file.with_suffix(f".{page}.csv.gz"), "wt") as file:
            file.write(text)
        if page == "raw":
            record.part("counters", kernels=gpu_profile.summary(text, titles))
    report.unlink()


def order(record: Record, scope: Scope) -> None:
    """What ``python -m benchmarks.dispatch`` would make of the measurements."""
    levels = record.content["levels"]
    measured = [item for level in ("op", "block") for item in levels.get(level, {}).items()]
    found = dispatch.orders((title, case["contenders"]) for title, case in measured)
    record.part("order", order=found)


def tune(record: Record, scope: Scope) -> None:
    """Faster tiles of the Triton kernels, for ``default_config``; nothing is stored."""
    if scope.device == "cpu":
        record.part("tune", reason="there is no GPU")
        return
    from effnet_kernels.benchmarking import tuner

    tiles: list[dict[str, Any]] = []
    for case in scope.large_cases():
        stock, x = (thing.to(memory_format=torch.channels_last) for thing in case.make())
        for tuned in tuner.tune(contenders.patched(stock, "triton"), x, minutes=record.left() / 60, rounds=ROUNDS):
            before, after = str(tuned.before), str(tuned.after)
            seconds = {"seconds_before": tuned.seconds_before, "seconds_after": tuned.seconds_after}
            key = tuning.class_name(tuned.problem_class)
            tiles.append({"op": tuned.op, "class": key, "before": before, "after": after, **seconds})
            record.part("tune", tiles=tiles)


class Part(NamedTuple):
    run: Callable[[Record, Scope], None]
    share: float  # of the budget, at most
    least: float = 10.0  # seconds; where fewer are left it is not begun
    again: bool = True  # in a call that finds it done: what failed in it may be tried anew


PARTS = {
    "build": Part(build, 0.4),
    "ceilings": Part(ceilings, 0.1, 2.0, again=False),
    "tests": Part(tests, 0.45, again=False),
    "flagship": Part(flagship, 0.3),
    "blocks": Part(blocks, 0.3),
    "ops": Part(ops, 0.4),
    "order": Part(order, 0.1, 1.0),
    "launches": Part(launches, 0.2, again=False),
    "counters": Part(counters, 0.4, 30.0, again=False),
    "models": Part(models, 0.3),
    "training": Part(training, 0.15),
    "compiled": Part(compiled, 1.0, 30.0),
    "autotuned": Part(autotuned, 1.0, 150.0),
    "memcheck": Part(memcheck, 0.3, 30.0, again=False),
    "racecheck": Part(racecheck, 1.0),
    "tune": Part(tune, 1.0),
}
# Two calls are what a machine that is there for a quarter of an hour has time for.
FIRST = ("build", "ceilings", "tests", "flagship", "blocks", "ops", "order", "launches", "counters")
SECOND = ("build", "flagship", "models", "training", "compiled", "autotuned", "memcheck")


def _run(record: Record, command: Iterable[str | Path], **variables: str) -> str:
    """What a command prints until it ends or the part's time does; it is written beside the record as it comes."""
    log = record.file.with_suffix(f".{record.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w+", errors="replace") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            # What a shell runs in the background ignores interrupts, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            process.wait(max(1.0, record.left() - 12))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then says why tests have failed
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
            file.seek(0, os.SEEK_END)
            file.write(CUT_OFF)
        file.seek(0)
        return file.read()
