"""Every barrier of the CUDA kernels is needed, and the emulation says so where one is missing.

It lets all threads pass one barrier as if it had been forgotten. The threads run in their natural order: the race is
found by rule.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.cuda.test_training import IMAGES_TOGETHER
from tests.cuda.test_training import TILED as TRAINING
from tests.emulation.build import asan_is_loaded
from tests.ops import inputs
from tests.ops.cases import Case, Depthwise, Fused, MBConv, Pointwise, Squeeze
from tests.training import blocks


class Spoilt(NamedTuple):
    """A case with an infinity in its input, for which kernels on tensor cores take the map a second time."""

    case: Case


SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"

# Problems that need all barriers of a file between them; of gemm.cuh, every kernel that is made of it.
EXPAND = [MBConv(2, (9, 18), cin=12, mid=40, cout=8), MBConv(3, (7, 7), cin=70, mid=130, cout=24)]
FUSED = [
    Fused(1, (13, 11), cin=40, mid=40, cout=None, residual=True),
    Fused(2, (9, 11), cin=16, mid=40, cout=24, stride=(2, 2), padding="tf"),
    Fused(1, (9, 13), cin=16, mid=200, cout=24, kernel=(1, 1)),  # a chunk is one step
]
RESIDENT = [
    Fused(3, (17, 9), cin=24, mid=24, cout=None, residual=True),
    Fused(3, (17, 9), cin=48, mid=192, cout=48, residual=True),
]
POINTWISE = [
    Pointwise(1, (13, 11), cin=200, cout=24, residual="nhwc"),
    Pointwise(2, (13, 12), cin=72, cout=130, pool=True),
]
STRIP = MBConv(1, (19, 70), cin=16, mid=48, cout=8, kernel=(3, 3), stride=(2, 2))
STEM = Fused(40, (8, 8), cin=3, mid=8, cout=None, stride=(2, 2))  # more places than a multiprocessor has warps
WITNESSES: dict[str, list[list]] = {
    "depthwise_conv_bn_act.cu": [[Depthwise(16, (35, 9), c=32)]],
    "depthwise_mma.cu": [[Depthwise(16, (35, 9), c=32)]],
    "expand_depthwise.cu": [EXPAND],
    "expand_depthwise_mma.cu": [[STRIP, Spoilt(STRIP)]],
    "fused_mbconv.cu": [FUSED],
    "fused_mbconv_resident.cu": [RESIDENT],
    "gemm.cuh": [EXPAND, FUSED, POINTWISE],
    "pointwise_conv_bn_act.cu": [POINTWISE],
    "stem.cu": [[STEM], [dataclasses.replace(STEM, layout="nchw")]],
    "squeeze_excite.cu": [[Squeeze(2, (17, 31), c=136, reduced=6), Squeeze(1, (3, 3), c=700, reduced=150)]],
    "train_depthwise.cu": [[TRAINING[0], IMAGES_TOGETHER]],
    "train_depthwise.cuh": [[TRAINING[0]]],
    "train_depthwise_backward.cu": [[TRAINING[0], IMAGES_TOGETHER]],
}
# Where a file's kernels are not for both.
DTYPES = {
    "depthwise_conv_bn_act.cu": [torch.float32],
    "depthwise_mma.cu": [torch.bfloat16],
    "expand_depthwise.cu": [torch.float32],
    "expand_depthwise_mma.cu": [torch.bfloat16],
    "fused_mbconv_resident.cu": [torch.bfloat16],
    "stem.cu": [torch.bfloat16],
}
BARRIERS = [
    pytest.param(path.name, number, witnesses, dtype, id=f"{path.name}:{number}-{i}-{dtype}")
    for path in sorted(SOURCES.glob("*.cu*"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"__sync|^ *bar_sync\(", line) and "// global memory" not in line  # which the emulation does not watch
    for i, witnesses in enumerate(WITNESSES[path.name])
    for dtype in DTYPES.get(path.name, [torch.float32, torch.bfloat16])
]


@functools.cache
def problem(case, dtype) -> Callable[[], list[Tensor]]:
    if isinstance(case, Spoilt):
        spoilt = inputs.build(case.case, dtype)
        spoilt.x[0, 0, 2, 2] = torch.inf
        return functools.partial(spoilt.call, "cuda")
    if isinstance(case, Case):
        return functools.partial(inputs.build(case, dtype).call, "cuda")
    return functools.partial(blocks.build(case, dtype).to(dtype, torch.float32).run, "cuda")


@pytest.fixture
def one_multiprocessor(emulation):
    """Long columns for a block: small problems are cut like large ones."""
    if emulation is None:
        pytest.skip("barriers can be forgotten in the emulation only")
    if asan_is_loaded():
        pytest.skip("AddressSanitizer is called before loads and stores, not what looks for races")
    emulation.set_device(90, multiprocessors=1)
    emulation.set_natural_order(True)
    yield emulation
    emulation.forget_barrier("", 0)
    emulation.set_natural_order(False)
    emulation.set_device(90)


@pytest.mark.parametrize(("file", "line", "witnesses", "dtype"), BARRIERS)
def test_a_barrier_that_is_forgotten_is_a_race(file, line, witnesses, dtype, one_multiprocessor):
    one_multiprocessor.forget_barrier(f"csrc/cuda/{file}", line)
    runs = [problem(case, dtype) for case in witnesses]
    race = r"without a barrier in between$|to which a cp\.async is under way$"
    address = r"calls cp\.async with a shared address, \w+, that is not a multiple of 16$"  # read before it was written
    with pytest.raises(RuntimeError, match=f"{race}|{address}"):
        [run() for run in runs]
