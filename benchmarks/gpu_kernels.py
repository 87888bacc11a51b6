"""Compile every Triton kernel that a run of ``benchmarks.gpu`` will launch, where there is no GPU, into one file.

    python -m benchmarks.gpu_kernels [--out FILE] [--architecture 90]

Compiling takes minutes that a rented GPU would wait for. ``python -m benchmarks.gpu --kernels FILE`` unpacks them.
"""

import argparse
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import stock
from benchmarks.cases import DTYPES
from benchmarks.gpu import CALLS, COMMAND
from benchmarks.gpu_parts import ROOT
from benchmarks.gpu_scope import GPU, Scope
from effnet_kernels import precompile
from effnet_kernels.benchmarking import tuner
from effnet_kernels.benchmarking.environment import commit
from effnet_kernels.ops import triton_common
from effnet_kernels.precompile import Launch

FILE = ROOT / "build" / "gpu-kernels.zip"
CLASSES = 5  # of each model
SIZE = 64  # nothing is specialised on sizes


def neighbours(scope: Scope, arch: int) -> Iterator[Launch]:
    """The tiles one step away from those of the largest launches at large batches, for the part ``tune``."""
    dtype = DTYPES[scope.dtype]
    for model, size, batch in (scope.flagship, *scope.models):
        if batch == scope.batch:
            found = precompile.distinct(precompile.record_model(model, size, batch, dtype, arch))
            # A gate has more constants that follow from its tile.
            found = [launch for launch in found if launch.op != "squeeze_excite_gate"]
            found = [launch for launch in found if launch.constants[-len(launch.config.block) :] == launch.config.block]
            for launch in sorted(found, key=_elements, reverse=True)[:CLASSES]:
                yield from map(launch.with_tile, tuner.neighbours(launch.config))


def _elements(launch: Launch) -> int:
    return sum(t.numel() for t in launch.tensors if t is not None)


def launches(scope: Scope, arch: int) -> Iterator[Launch]:
    """Those of all its models, training steps and ops; blocks are parts of models."""
    dtype = DTYPES[scope.dtype]
    for model in dict.fromkeys(name for name, _, _ in (scope.flagship, *scope.models)):
        yield from precompile.record_model(model, SIZE, 2, dtype, arch)
    for model, _, _ in scope.training:
        yield from precompile.record_model(model, SIZE, 2, dtype, arch, training=True)
    for op in scope.ops:
        with torch.device("meta"):
            ours = stock.OurOp(op, stock.stock_op(op).to(dtype), "triton").eval()
            x = torch.empty(2, op.channels[0], SIZE, SIZE, dtype=dtype)
        yield from precompile.record_module(ours.to(memory_format=torch.channels_last), x, arch)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--architecture", type=int, default=90, help="ten times the GPU's compute capability")
    parser.add_argument("--tune", action="store_true", help="also the tiles that the part tune tries first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels compiled at a time")
    options = parser.parse_args(arguments)
    began = time.time()
    arch = triton_common.arch_of(options.architecture // 10)
    found = list(launches(GPU, arch))
    progress = functools.partial(print, flush=True)
    more = list(neighbours(GPU, arch)) if options.tune else []
    count = precompile.pack(options.out, found, options.architecture, options.jobs, progress, optional=more)
    size = options.out.stat().st_size >> 10
    print(f"{count} kernels in {time.time() - began:.0f} s: {options.out}, {size} KiB\n\nThe calls (docs/gpu.md):")
    for call in CALLS:
        print(f"    {COMMAND.format(call=call, commit=commit() or 'COMMIT')}")


if __name__ == "__main__":
    main()
