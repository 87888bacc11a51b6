"""Predicts the Triton kernels' times on an H100 and writes them into docs/performance.md, between its markers.

A model, not a measurement. Every launch of a patched model is recorded and compiled for sm_90 (no GPU needed), and
takes as long as the slowest of four things that are taken to overlap perfectly:

    python -m benchmarks.gpu_prediction

What a warp issues for each output stands beside that of an earlier commit, which ``--keep`` writes into
``gpu_prediction.json``: run there with ``--keep``, and later without, it shows before and after.
Where ``benchmarks/results/`` has the launches of the same models measured, their times stand beside the predictions.
"""

import argparse
import json
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.ahead_of_time import Resources, compile_launch, describe, executed, matrix_instruction
from effnet_kernels.benchmarking.environment import describe as describe_environment
from effnet_kernels.precompile import Launch, record_model

COUNTS = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ARCH = 90
DTYPE = torch.float16
DRAM = 3.0e12  # bytes per second, as in DESIGN's floors
L2 = 5.5e12  # bytes per second from the L2 to all multiprocessors
TENSOR = {"HGMMA": 800e12, "HMMA": 500e12}  # reachable operations per second
ISSUE = 132 * 4 * 1.7e9  # instructions of a warp per second: multiprocessors, schedulers, clock
LAUNCH = 1.0e-6  # seconds between dependent kernels of a CUDA graph
BATCH = 128
MODELS = {"efficientnet_b0": 224, "efficientnet_b4": 380, "tf_efficientnetv2_s": 384}
# Seconds per image at DRAM speed: each convolution one kernel; SE folded in as well, which is what these kernels do.
FLOORS = {
    "efficientnet_b0": (13.8e-6, 9.1e-6),
    "efficientnet_b4": (107e-6, 68e-6),
    "tf_efficientnetv2_s": (70e-6, 38e-6),
}
BEGIN, END = "<!-- gpu-prediction:begin -->", "<!-- gpu-prediction:end -->"

TEXT = """{begin}
## The Triton backend on an H100: a prediction

**Only what stands under "measured" in this section was measured.** The rest is a model, computed by
`python -m benchmarks.gpu_prediction` from machine code compiled ahead of time for sm_90: float16, batch {batch}. A
launch takes the longest of four times, as if they overlapped perfectly, and {launch:.0f} us for following another one:

* *DRAM*: every tensor of the launch once, at {dram:.1f} TB/s; re-reads are taken to hit the L2;
* *L2*: what programs load and store, re-reads of weights, windows and shared pixels included, at {l2:.1f} TB/s; of the
  windows of dense tiles with 256 expanded channels, copied through the L1, each pixel once in a program, as if every
  later copy found it there;
* *tensor*: the products with all padding of tiles, at {hgmma:.0f} TFLOP/s (HGMMA) or {hmma:.0f} (HMMA);
* *issue*: the instructions that warps issue, at {issue:.2f} per ns. Those of a loop count once per trip; slow paths of
  divisions and square roots, for subnormal and huge values, are taken not to run.

Tails of waves, latencies that too few warps leave open, and cache misses beyond this are left out: the truth is higher.
*KiB* are of shared memory, *moved* is the L2 traffic over the least that any implementation of the op must move;
*floor* is that least from DRAM.

| model | launches | predicted, per image | floor of one kernel per convolution | floor with SE folded in | bound by |
|---|---|---|---|---|---|
{models}

The launches that take at least 3% of their model's time:

| model | launch | count | tile | registers | KiB | warps/SM | moved | floor | bound by | predicted | measured | ratio |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
{launches}

{note}

What that code issues: instructions of a lane per output, those of loops by their trips; barriers that a program passes;
registers; warps on a multiprocessor. What stands first is of commit {before}. Launches that take at least 1% of their
model's time, on the maps of the first of these models that has them.

| launch | tile | instructions per output | barriers | registers | warps/SM |
|---|---|---|---|---|---|
{counts}
{end}"""


class Work(NamedTuple):
    """What one launch has to do: bytes that the op cannot avoid, bytes through the L2, multiply-adds times two."""

    minimum: float
    l2: float
    operations: float


class Counts(NamedTuple):
    """What the machine code of a launch issues and holds."""

    tile: str
    instructions: float  # of a lane for each output
    barriers: int  # that a program passes
    registers: int
    warps: int  # on a multiprocessor


class Prediction(NamedTuple):
    seconds: float
    bound: str
    floor: float
    moved: float  # over the minimum


def work(launch: Launch) -> Work:
    """By the op's tiling; see the head of its file."""
    tensors = [t for t in launch.tensors if t is not None]
    all_bytes = float(sum(t.numel() * t.itemsize for t in tensors))
    if launch.op == "pointwise_conv_bn_act":
        return _pointwise(launch, all_bytes)
    if launch.op == "fused_mbconv":
        return _fused(launch, all_bytes)
    if launch.op == "depthwise_conv_bn_act" and launch.kernel.fn.__name__ == "kernel":
        return _depthwise(launch, all_bytes)
    return _gate(launch, all_bytes) if launch.op == "squeeze_excite_gate" else Work(all_bytes, all_bytes, 0)


def _gate(launch: Launch, all_bytes: float) -> Work:
    """In one launch every program reads the first layer and the sums, and its share of the second layer.

    In two, weights are read for each group of images; hidden units come in parts, which every slice of channels reads.
    """
    sizes = [float(t.numel() * t.itemsize) for t in launch.tensors if t is not None]
    if launch.kernel.fn.__name__ == "whole_kernel":
        gate, sums, w_reduce, b_reduce, w_expand, b_expand = sizes
        images = launch.programs // int(launch.sizes[2])
        shared = launch.programs / images * (sums + images * (w_reduce + b_reduce))
        return Work(all_bytes, gate + shared + images * (w_expand + b_expand), 0)
    images, block_r, block_c = launch.config.block
    groups = -(-int(launch.sizes[0]) // images)
    if launch.kernel.fn.__name__ == "hidden_kernel":
        parts, sums, *weights = sizes
        moved = parts + sums * -(-launch.constant("R") // block_r)
    else:
        gate, parts, *weights = sizes
        moved = gate + parts * -(-launch.constant("C") // block_c)
    return Work(all_bytes - parts, moved + sum(weights) * groups, 0)


def _pointwise(launch: Launch, all_bytes: float) -> Work:
    element = launch.dtype.itemsize
    c_in, c_out = launch.constant("C_IN"), launch.constant("C_OUT")
    block_m, block_n, block_k = launch.config.block
    tiles_n = -(-c_out // block_n)
    x = launch.tensors[1]
    assert x is not None
    tiles = launch.programs  # of pixels by channels
    if launch.constant("POOL"):
        tiles *= -(-x.shape[2] * x.shape[3] // block_m)
    again = (tiles_n - 1) * x.numel() * element + (tiles / tiles_n - 1) * c_in * c_out * element
    return Work(all_bytes, all_bytes + again, 2.0 * tiles * block_m * block_n * -(-c_in // block_k) * block_k)


def _fused(launch: Launch, all_bytes: float) -> Work:
    """Each tap reads x from the L2, but where copies go through the L1: there each program does, each pixel once."""
    element = launch.dtype.itemsize
    c_in, c_mid, c_out = (launch.constant(name) for name in ("C_IN", "C_MID", "C_OUT"))
    block_m, block_mid, block_out, block_k = launch.config.block
    taps = launch.constant("KH") * launch.constant("KW")
    chunks = -(-c_mid // block_mid)  # in one program if there is a projection, else spread over programs
    tiles = launch.programs / (-(-c_out // block_out) if c_out else chunks)
    flat = -(-taps * c_in // block_k) * block_k
    depth = flat if launch.constant("FLAT") else taps * -(-c_in // block_k) * block_k
    windows = chunks * tiles * block_m * taps * c_in * element
    if block_mid == 256 and not launch.constant("FLAT") and c_in % 4 == 0:
        kh, kw, sh, sw = (launch.constant(name) for name in ("KH", "KW", "SH", "SW"))
        run = (block_m - 1) * sw + kw  # pixels of a row of x under a tile, as if its own were in one row
        width = int(launch.sizes[2])
        windows = tiles * min(kh * run, sh * run + max(kh - sh, 0) * width) * c_in * element
    weights = tiles * c_mid * (taps * c_in + c_out) * element
    y = launch.tensors[0]
    assert y is not None
    operations = 2.0 * tiles * block_m * chunks * block_mid * (depth + (block_out if c_out else 0))
    return Work(all_bytes, windows + weights + y.numel() * element, operations)


def _depthwise(launch: Launch, all_bytes: float) -> Work:
    """The means' partial sums are not part of the minimum. Columns that neighbouring taps share come from the L1."""
    y, sums = launch.tensors[:2]
    assert y is not None
    rows, columns, block_c = launch.config.block
    kh, kw, sh, sw = (launch.constant(name) for name in ("KH", "KW", "SH", "SW"))
    height, width = (int(size) for size in launch.sizes[:2])
    window = min((rows - 1) * sh + kh, height) * min((columns - 1) * sw + kw, width) * block_c * launch.dtype.itemsize
    partial = 0 if sums is None else sums.numel() * sums.itemsize
    return Work(all_bytes - partial, launch.programs * window + y.numel() * y.itemsize + partial, 0)


def multiplied(issued: Counter[str]) -> int:
    """Multiply-adds times two in the matrix instructions of a warp; the 64 rows of an HGMMA are those of four warps."""
    total = 0
    for mnemonic, times in issued.items():
        if found := re.match(r"(?:HGMMA\.64x(\d+)x|HMMA\.16(8))(\d+)\.", mnemonic):
            total += times * 2 * 16 * int(found[1] or found[2]) * int(found[3])
    return total


def predict(launch: Launch, resources: Resources) -> Prediction:
    """Raises ValueError where the instructions counted do not make the op's products: trips were miscounted then."""
    todo = work(launch)
    issued = executed(launch, resources)
    warps = launch.programs * launch.config.num_warps
    if warps * multiplied(issued) != todo.operations:
        raise ValueError(
            f"{describe(launch)}: {warps * multiplied(issued)} operations counted, {todo.operations} to do"
        )
    times = {
        "DRAM": sum(t.numel() * t.itemsize for t in launch.tensors if t is not None) / DRAM,
        "L2": todo.l2 / L2,
        "tensor": todo.operations / TENSOR[matrix_instruction(launch, ARCH) or "HMMA"],
        "issue": warps * issued.total() / ISSUE,
    }
    bound = max(times, key=lambda name: times[name])
    return Prediction(times[bound] + LAUNCH, bound, todo.minimum / DRAM, todo.l2 / todo.minimum)


def measured(model: str, launches: list[Launch]) -> tuple[list[list[float]], str]:
    """Seconds of each launch in a forward pass of the model, in order, and on what; none where another grid was run.

    Gates are left out: records of earlier kernels have other numbers of launches for them.
    """
    title = f"{model} @{MODELS[model]}, batch {BATCH}, float16"
    others = [i for i, launch in enumerate(launches) if launch.op != "squeeze_excite_gate"]
    times: list[list[float]] = [[] for _ in launches]
    for file in sorted(RESULTS.glob("*.json"), reverse=True):
        content = json.loads(file.read_text())
        part = content.get("parts", {}).get("launches", {}).get("launches", {})
        lines = part.get(title, {}).get("effnet_kernels triton", [])
        found = [match for line in lines if (match := re.fullmatch(r"(\S+) us [Kk]ernel grid (\d+)x1x1", line))]
        if len(found) == len(others):
            for i, match in zip(others, found, strict=True):
                if int(match[2]) == launches[i].programs:
                    times[i].append(float(match[1]) * 1e-6)
            return times, describe_environment(content["environment"])
    return times, ""


def counts(launch: Launch, resources: Resources) -> Counts:
    issued = executed(launch, resources)
    lanes = 32 * launch.programs * launch.config.num_warps
    y = launch.tensors[0]
    assert y is not None
    return Counts(
        _tile(launch),
        round(issued.total() * lanes / y.numel(), 1),
        sum(times for mnemonic, times in issued.items() if mnemonic.startswith("BAR")),
        resources.registers,
        resources.blocks * launch.config.num_warps,
    )


def _tile(launch: Launch) -> str:
    return "x".join(map(str, launch.config.block)) + f", {launch.config.num_warps} warps"


def _before_and_now(before: list | None, now: Counts) -> str:
    pairs = zip(before, now, strict=True) if before else ((None, value) for value in now)
    return " | ".join(str(new) if old in (None, new) else f"{old}, now {new}" for old, new in pairs)


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def _beside(times: list[float], predicted: float) -> str:
    if not times:
        return " | "
    mean = sum(times) / len(times)
    return f"{us(mean)} | {mean / predicted:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--keep", action="store_true", help="write the counts, for later ones to be set beside")
    options = parser.parse_args()
    earlier: dict[str, Any] = {"commit": "none", "launches": {}}
    if COUNTS.exists():
        earlier = json.loads(COUNTS.read_text())
    issued: dict[str, Counts] = {}
    shown: set[str] = set()
    compiled: dict[tuple, Resources] = {}
    model_rows, launch_rows, note = [], [], ""
    for model in options.models:
        launches = record_model(model, MODELS[model], BATCH, DTYPE, ARCH)
        times, where = measured(model, launches)
        note = f"Measured by torch's profiler, but for tiles that are newer, on {where}." if where else note
        took: defaultdict[tuple, list[float]] = defaultdict(list)
        same: Counter[tuple] = Counter()
        predicted: dict[tuple, tuple[Launch, Resources, Prediction]] = {}
        for launch, seconds in zip(launches, times, strict=True):
            variant = launch.variant()
            if variant not in compiled:
                compiled[variant] = compile_launch(launch, ARCH)
                print(f"{model}: {describe(launch)}", flush=True)
            key = (variant, launch.programs, launch.sizes)
            same[key] += 1
            took[key] += seconds
            predicted[key] = launch, compiled[variant], predict(launch, compiled[variant])
        total = sum(count * predicted[key][2].seconds for key, count in same.items())
        shares: Counter[str] = Counter()
        for key, count in same.items():
            shares[predicted[key][2].bound] += round(100 * count * predicted[key][2].seconds / total)
        bounds = ", ".join(f"{bound} {share}%" for bound, share in shares.most_common())
        unfused, folded = FLOORS[model]
        name = f"{model} @{MODELS[model]}"
        model_rows.append(
            f"| {name} | {len(launches)} | {us(total / BATCH)} | {us(unfused)} | {us(folded)} | {bounds} |"
        )
        for launch, resources, _ in predicted.values():
            issued.setdefault(describe(launch), counts(launch, resources))
        for key, count in sorted(same.items(), key=lambda item: -item[1] * predicted[item[0]][2].seconds):
            launch, resources, result = predicted[key]
            if count * result.seconds >= 0.01 * total:
                shown.add(describe(launch))
            if count * result.seconds >= 0.03 * total:
                warps = resources.blocks * launch.config.num_warps
                launch_rows.append(
                    f"| {model} | {describe(launch)} | {count} | {_tile(launch)} | {resources.registers} "
                    f"| {resources.shared / 1024:.0f} | {warps} | {result.moved:.2f}x "
                    f"| {us(result.floor)} | {result.bound} | {us(result.seconds)} "
                    f"| {_beside(took[key], result.seconds)} |"
                )
    text = TEXT.format(
        begin=BEGIN, end=END, batch=BATCH, launch=LAUNCH * 1e6, dram=DRAM / 1e12, l2=L2 / 1e12,
        hgmma=TENSOR["HGMMA"] / 1e12, hmma=TENSOR["HMMA"] / 1e12, issue=ISSUE / 1e9,
        models="\n".join(model_rows), launches="\n".join(launch_rows), note=note, before=earlier["commit"],
        counts="\n".join(
            f"| {name} | {_before_and_now(earlier['launches'].get(name), issued[name])} |" for name in sorted(shown)
        ),
    )  # fmt: skip
    if options.keep:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in issued.items())
        COUNTS.write_text(f'{{\n "commit": "{commit}",\n "launches": {{\n{lines}\n }}\n}}\n')
    options.output.write_text(inserted(options.output.read_text() if options.output.exists() else "", text))


def inserted(page: str, text: str) -> str:
    """The page with the text in place of what stands between the markers, or at its end where there are none."""
    before, begin, rest = page.partition(BEGIN)
    if not begin:
        return f"{page.rstrip()}\n\n{text}\n".lstrip()
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{BEGIN} without {END}")
    return before + text + after


if __name__ == "__main__":
    main()
