"""``mbconv`` in CUDA: the expanded map in shared memory, whole or in strips; the composition where it does not fit."""

import itertools

import pytest
import torch

from effnet_kernels.ops.native_cuda import KERNELS, STRIDES
from tests.cuda.tools import check, cycled
from tests.ops import oracle
from tests.ops.cases import DTYPES, MBConv
from tests.ops.device import native
from tests.ops.inputs import build
from tests.ops.special_values import check_value, each_value

WINDOWS = list(itertools.product((3, 5), (1, 2), ("same", "tf", "none", "large")))
# Slices are 64 or 32 channels, GEMM tiles 128 pixels.
SHAPES = [
    MBConv(1, (30, 21), cin=24, mid=72, cout=8),  # strips on a GPU with little shared memory
    MBConv(3, (7, 7), cin=70, mid=130, cout=24),  # two images in a block; no rows of 16 bytes
    MBConv(5, (5, 5), cin=16, mid=64, cout=16, residual=True),  # as many as fit
    MBConv(3, (5, 6), cin=7, mid=9, cout=5, act="hardswish"),  # an odd number of channels
    MBConv(130, (1, 1), cin=8, mid=16, cout=8),
    # Several images in a block, and rows below the last window.
    MBConv(3, (8, 8), cin=8, mid=16, cout=8, kernel=(3, 3), stride=(2, 2), padding="none"),
    MBConv(5, (6, 6), cin=16, mid=40, cout=8, kernel=(5, 5), stride=(2, 2), padding="none"),
    MBConv(4, (4, 7), cin=16, mid=40, cout=8, kernel=(3, 3), stride=(2, 2), padding="none"),
]


@pytest.mark.parametrize(("kernel", "stride", "padding"), WINDOWS)
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_windows(kernel, stride, padding, emulation):
    case = MBConv(2, (9, 18), cin=12, mid=40, cout=8, kernel=(kernel, kernel), stride=(stride, stride), padding=padding)
    for dtype in DTYPES:
        check(case, dtype, emulation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_shapes(case, dtype, emulation):
    check(case, dtype, emulation)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_strips(kernel, stride, emulation, device):
    """A map of which no GPU's shared memory holds all."""
    case = MBConv(1, (40, 64), cin=8, mid=24, cout=8, kernel=(kernel, kernel), stride=(stride, stride), padding="tf")
    check(case, torch.bfloat16, emulation)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [each for each in cycled(MBConv) if each.values[0].kernel in KERNELS and each.values[0].stride in STRIDES],
)
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_hostile(case, dtype):
    oracle.check(native(build(case, dtype)), "cuda")


@pytest.mark.parametrize(
    ("case", "launches"),
    [
        (MBConv(2, (7, 7), mid=64), 3),  # expand + depthwise, gate, project
        (MBConv(2, (7, 7), mid=64, reduced=None), 2),
        (MBConv(2, (7, 7), mid=None), 3),  # depthwise, gate, project
        (MBConv(2, (9, 9), mid=64, kernel=(7, 7)), 4),  # 7x7 has no kernel with the expansion
    ],
    ids=str,
)
@torch.no_grad()
def test_launches(case, launches, emulation):
    if emulation is None:
        pytest.skip("launches are counted by the emulation")
    problem = build(case, torch.bfloat16)
    emulation.set_seed(0)
    problem.call("cuda")
    assert emulation.launches() == launches


@each_value
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("act", ["silu", "relu"])
@torch.no_grad()
def test_a_value_that_is_not_finite_goes_where_stock_lets_it_go(act, value, dtype):
    check_value(native(build(MBConv(2, (5, 6), cin=17, mid=35, cout=18, act=act), dtype)), value, "cuda")
