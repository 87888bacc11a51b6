"""What the accesses of the CUDA kernels cost, counted in the emulation: ``python -m tests.emulation.costs``.

For every request of a warp: the wavefronts of shared memory, or the sectors of 32 bytes of global memory, and how many
the same bytes would take side by side. Counted is the first block of each launch. g++ has compiled the kernels: what is
read how often may differ from nvcc's code, how the lanes of a request lie does not.
"""

import argparse
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from effnet_kernels.benchmarking.tables import text_table
from tests.emulation import build
from tests.ops import inputs
from tests.ops.cases import Depthwise, Fused, MBConv, Pointwise, Squeeze
from tests.training import blocks

CASES = (
    Pointwise(1, (14, 14), cin=96, cout=576),
    Pointwise(1, (14, 14), cin=480, cout=80, gate=True, residual="nhwc"),
    Depthwise(1, (28, 28), c=144),
    Depthwise(1, (28, 28), c=144, kernel=(5, 5), stride=(2, 2)),
    Squeeze(1, (14, 14), c=480, reduced=20),
    Fused(1, (28, 28), cin=3, mid=32, cout=None, stride=(2, 2)),
    Fused(1, (14, 14), cin=24, mid=24, cout=None, residual=True),
    Fused(1, (28, 28), cin=24, mid=96, cout=48, stride=(2, 2)),
    Fused(1, (14, 14), cin=48, mid=192, cout=48, residual=True),
    Fused(1, (14, 14), cin=64, mid=256, cout=64, residual=True),
    MBConv(1, (14, 14), cin=80, mid=480, cout=80, reduced=20, residual=True),
)
TRAINING = blocks.Case("d", (144, 144), 2, (28, 28), last_act="silu")


class Row(NamedTuple):
    kernel: str
    memory: str
    line: str
    requests: int
    moved: int  # wavefronts or sectors
    ideal: int


def counted(dtype: torch.dtype) -> Iterator[Row]:
    """One row for every line of a kernel that touches memory."""
    emulation = build.load()
    runs = [functools.partial(inputs.build(case, dtype).call, "cuda") for case in CASES]
    runs.append(functools.partial(blocks.build(TRAINING, dtype).to(dtype, torch.float32).run, "cuda"))
    for run in runs:
        emulation.count(True)
        try:
            run()
            for kernel, line, shared, *numbers in emulation.costs():
                found = re.search(r"\w+_kernel", kernel)
                yield Row(found[0] if found else kernel, "shared" if shared else "global", line, *numbers)
        finally:
            emulation.count(False)


def table(rows: list[Row], key: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Sums of the rows by these fields, and what a request costs; the most over what is needed first."""
    sums: defaultdict[tuple, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in rows:
        total = sums[tuple(getattr(row, field) for field in key)]
        for i, value in enumerate((row.requests, row.moved, row.ideal)):
            total[i] += value
    found = sorted(sums.items(), key=lambda item: item[1][2] - item[1][1])
    return [
        (*of, str(requests), f"{moved / requests:.2f}", f"{ideal / requests:.2f}", f"{moved / ideal:.2f}")
        for of, (requests, moved, ideal) in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.emulation.costs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--lines", type=int, default=20, help="how many of the worst lines to list")
    options = parser.parse_args()
    rows = list(counted(getattr(torch, options.dtype)))
    numbers = ("requests", "each", "ideal", "ratio")
    print(text_table(("kernel", "memory", *numbers), sorted(table(rows, ("kernel", "memory")))))
    print()
    print(
        text_table(("kernel", "line", "memory", *numbers), table(rows, ("kernel", "line", "memory"))[: options.lines])
    )


if __name__ == "__main__":
    main()
