"""The parts of a run of ``benchmarks.gpu``, in order of worth: functions of the record, each in its own process."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import effnet_kernels
from benchmarks import cases, dispatch, shapes
from benchmarks.gpu_record import TAIL, Record
from benchmarks.shapes import Op
from effnet_kernels import native, tuning
from effnet_kernels.benchmarking import contenders, timing
from effnet_kernels.benchmarking.contenders import AUTOTUNED, CHANNELS_LAST, COMPILED, STOCK, ours
from effnet_kernels.benchmarking.models import create_model, noise

ROOT = Path(__file__).resolve().parents[1]


class Scope(NamedTuple):
    """How much is measured: what a GPU is bought for, or as little as shows that everything runs."""

    device: str
    dtype: str
    flagship: tuple[str, int, int]  # model, size, batch
    models: tuple[tuple[str, int, int], ...]
    training: tuple[tuple[str, int, int], ...]
    ops: tuple[Op, ...]
    batch: int  # of ops and blocks
    blocks: int  # of each kind
    eager: tuple[str, ...]
    compiled: tuple[str, ...]
    backends: tuple[str, ...]
    trainers: tuple[str, ...]  # backends in training
    seconds: float  # for each contender of each case
    copy_bytes: int
    matrix: int


# B0's depthwise convolutions whose maps exceed an L2 of 50 MB at batch 128, then one of every other kind.
OPS = (
    *(Op("depthwise", (c, c), size, kernel, stride) for c, size, kernel, stride in (
        (32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 5, 2), (240, 28, 5, 1), (480, 14, 3, 1),
        (672, 14, 5, 1),
    )),
    Op("pointwise", (16, 96), 112), Op("pointwise", (144, 24), 56), Op("pointwise", (40, 240), 28),
    Op("pointwise", (192, 1152), 7), Op("squeeze_excite", (96, 4), 56), Op("squeeze_excite", (480, 20), 14),
    Op("fused", (48, 48), 96, 3, 1, 192), Op("fused", (24, 24), 192, 3, 1, 24),
)  # fmt: skip
GPU = Scope(
    device="cuda",
    dtype="float16",
    flagship=("efficientnet_b0", 224, 128),
    models=(
        ("efficientnet_b0", 224, 1), ("tf_efficientnetv2_s", 384, 128), ("efficientnet_b4", 380, 128),
        ("efficientnet_lite0", 224, 128), ("tf_efficientnet_b0", 224, 128), ("tf_efficientnetv2_m", 480, 64),
        ("tf_efficientnetv2_l", 480, 64), ("efficientnet_b7", 600, 32), ("efficientnet_b0", 224, 8),
        *((name, size, batch) for batch in (8, 1) for name, size in (
            ("tf_efficientnetv2_s", 384), ("efficientnet_b4", 380), ("efficientnet_b7", 600),
        )),
    ),
    training=(("efficientnet_b0", 224, 128), ("tf_efficientnetv2_s", 300, 64), ("efficientnet_b4", 380, 32)),
    ops=OPS,
    batch=128,
    blocks=4,
    eager=(STOCK, CHANNELS_LAST),
    compiled=(COMPILED,),
    backends=("triton", "cuda", "auto"),
    trainers=("triton",),
    seconds=0.5,
    copy_bytes=1 << 30,
    matrix=8192,
)  # fmt: skip
SMOKE = GPU._replace(
    device="cpu",
    dtype="float32",
    flagship=("test_efficientnet", 32, 2),
    models=(("test_efficientnet", 40, 1),),
    training=(("test_efficientnet", 96, 4),),  # smaller, and gradients are rounding errors
    ops=(Op("depthwise", (16, 16), 8, 3, 1), Op("pointwise", (16, 24), 8)),
    batch=2,
    blocks=1,
    eager=(CHANNELS_LAST,),
    compiled=(),
    backends=("reference", "auto"),
    trainers=("reference", "auto"),
    seconds=0.01,
    copy_bytes=1 << 20,
    matrix=64,
)


def scope_of(device: str) -> Scope:
    return GPU if device == "cuda" else SMOKE


def names(scope: Scope, *, autotuned: bool = False, backends: Sequence[str] | None = None) -> list[str]:
    """The contenders: baselines, ours on those backends that there are, and last what may take minutes to compile."""
    available = {"auto": (True, ""), **effnet_kernels.backends()}
    wanted = scope.backends if backends is None else backends
    compiled = [*scope.compiled, *([AUTOTUNED] if autotuned and scope.compiled else [])]
    return [*scope.eager, *(ours(name) for name in wanted if available[name][0]), *compiled]


# ---- the code itself: built, right, clean -------------------------------------------------------------------


def build(record: Record, scope: Scope) -> None:
    """The CUDA library as it was brought along, or compiled here for this GPU where that one does not serve."""
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
        "copy_bytes_per_second": timing.copy_bandwidth(scope.device, scope.copy_bytes),
        "matrix_flops_per_second": timing.matrix_rate(cases.DTYPES[scope.dtype], scope.device, scope.matrix),
    }
    record.content["environment"] |= measured
    record.part("ceilings", backends={name: list(found) for name, found in effnet_kernels.backends().items()})


def tests(record: Record, scope: Scope) -> None:
    """``pytest -m gpu``: the kernels natively. Without a GPU they are only collected."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", "-m", "gpu"]
    command += ["tests/gpu", "tests/cuda", "tests/triton"]
    if scope.device == "cpu":
        command += ["--collect-only", "-q"]
    else:
        command += ["-v"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(12, os.cpu_count() or 1))]  # most of the time goes into compiling
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout", "120"]  # a kernel that hangs
    output = _run(record, command, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    record.part("tests", **outcome(output))


def outcome(output: str) -> dict[str, Any]:
    """What ``pytest -v`` said, with or without pytest-xdist, be it to the end or until it was cut off."""
    kinds = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", output.split("short test summary")[0])
    failures = re.findall(r"^(?:FAILED|ERROR) (.{1,300})", output, re.MULTILINE)  # of the summary, with reasons
    failures = failures or re.findall(r"(?:FAILED|ERROR) (tests/\S+)|(tests/\S+) (?:FAILED|ERROR)", output)
    counts = {kind.lower(): kinds.count(kind) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    last = (output.strip().splitlines() or [""])[-1]
    return {**counts, "failures": ["".join(found) for found in failures][:100], "last_line": last}


def sanitizers(record: Record, scope: Scope) -> None:
    """compute-sanitizer over one small call of every CUDA kernel: memory, then races."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    tool = shutil.which("compute-sanitizer") or shutil.which(home / "bin" / "compute-sanitizer")
    if tool is None or scope.device == "cpu":
        record.part("sanitizers", reason="there is no compute-sanitizer" if tool is None else "there is no GPU")
        return
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
        command += ["-p", "no:cacheprovider", "tests/gpu", "-k", "many_runs and cuda"]
        # An allocation each, or a write beyond a tensor would land in another one of torch's block.
        output = _run(record, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="1")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*|\d+ passed.*|\d+ failed.*", output)
        findings = [line for line in output.splitlines() if line.startswith("=========")]
        record.part("sanitizers", **{check: summary, f"{check}_findings": findings[:40]})


# ---- measurements -------------------------------------------------------------------------------------------


def flagship(record: Record, scope: Scope) -> None:
    """The headline: B0, a large batch, every contender."""
    record.measure(
        cases.model_case(*scope.flagship, scope.dtype, scope.device), names(scope, autotuned=True), scope.seconds
    )


def ops(record: Record, scope: Scope) -> None:
    """Every kind of kernel beside the bandwidth of a copy."""
    scope = scope._replace(eager=(CHANNELS_LAST,))
    backends = [name for name in scope.backends if name != "auto"]
    for op in scope.ops:
        model = "tf_efficientnetv2_s" if op.kind == "fused" else "efficientnet_b0"
        case = cases.op_case(model, op, 1, scope.batch, scope.dtype, scope.device)
        record.measure(case, names(scope, backends=backends), scope.seconds)


def models(record: Record, scope: Scope) -> None:
    """Whole networks, one forward pass."""
    for model, size, batch in scope.models:
        record.measure(cases.model_case(model, size, batch, scope.dtype, scope.device), names(scope), scope.seconds)


def training(record: Record, scope: Scope) -> None:
    """Training steps of whole networks: time and peak memory."""
    wanted = names(scope, backends=scope.trainers)
    for model, size, batch in scope.training:
        record.measure(cases.training_case(model, size, batch, scope.dtype, scope.device), wanted, scope.seconds)


def blocks(record: Record, scope: Scope) -> None:
    """The blocks of the flagship and of a V2 that move the most bytes."""
    flagship, size, _ = scope.flagship
    v2 = next((model for model in scope.models if "v2" in model[0]), scope.flagship)
    for model, side in {flagship: size, v2[0]: v2[1]}.items():
        found = shapes.blocks(model, side)
        for block in shapes.largest(found, scope.blocks):
            case = cases.block_case(model, block, found[block], scope.batch, scope.dtype, scope.device)
            record.measure(case, names(scope), scope.seconds)


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

    name, size, batch = scope.flagship
    dtype = cases.DTYPES[scope.dtype]
    model = contenders.patched(create_model(name).to(scope.device, dtype, memory_format=torch.channels_last), "triton")
    x = noise(batch, size, dtype=dtype, device=scope.device).to(memory_format=torch.channels_last)
    tiles: list[dict[str, Any]] = []
    for tuned in tuner.tune(model, x, minutes=record.left() / 60):
        before, after = str(tuned.before), str(tuned.after)
        seconds = {"seconds_before": tuned.seconds_before, "seconds_after": tuned.seconds_after}
        key = tuning.class_name(tuned.problem_class)
        tiles.append({"op": tuned.op, "class": key, "before": before, "after": after, **seconds})
        record.part("tune", tiles=tiles)


# By name: the function, and the largest share of the budget that it may take.
PARTS: dict[str, tuple[Callable[[Record, Scope], None], float]] = {
    "build": (build, 0.4),
    "ceilings": (ceilings, 0.1),
    "tests": (tests, 0.4),
    "sanitizers": (sanitizers, 0.15),
    "flagship": (flagship, 0.6),
    "ops": (ops, 0.5),
    "models": (models, 0.8),
    "training": (training, 0.6),
    "blocks": (blocks, 0.6),
    "order": (order, 0.1),
    "tune": (tune, 1.0),
}


def _run(record: Record, command: Iterable[str | Path], **variables: str) -> str:
    """What a command prints until it ends or the part's time does."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            process.wait(max(1.0, record.left() - 5))
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(4)
            except subprocess.TimeoutExpired:
                process.kill()
            log.seek(0, os.SEEK_END)
            log.write("\ncut off: out of time\n")
        log.seek(0)
        return log.read()
