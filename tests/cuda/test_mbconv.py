"""``mbconv`` in CUDA: the expanded map in shared memory, whole or in strips; the composition where it does not fit."""

import itertools

import pytest
import torch

from effnet_kernels.dispatch import Query, backends
from effnet_kernels.ops import mbconv_mixed as mixed
from tests.cuda.tools import check
from tests.ops import oracle
from tests.ops.cases import MBConv, cells
from tests.ops.device import native, on_device
from tests.ops.inputs import build
from tests.ops.special_values import check_value, each_value

WINDOWS = [
    MBConv(2, (9, 18), cin=12, mid=40, cout=8, kernel=(kernel, kernel), stride=(stride, stride), padding=padding)
    for kernel, stride, padding in itertools.product((3, 5), (1, 2), ("same", "tf", "none", "large"))
]
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
    # In 16 bits: strips and bands, blocks of three and of four warps, channels that are no 16 bytes or no pair.
    MBConv(1, (37, 133), cin=24, mid=144, cout=8, kernel=(3, 3), stride=(2, 2), padding="tf"),
    MBConv(2, (18, 60), cin=32, mid=64, cout=8, kernel=(3, 3), stride=(2, 2)),
    MBConv(2, (9, 21), cin=13, mid=23, cout=8, kernel=(3, 3), stride=(2, 2), padding="large"),
    MBConv(1, (9, 70), cin=20, mid=36, cout=8, kernel=(3, 3), stride=(2, 2), act="hardswish"),
]


@pytest.mark.parametrize(("case", "dtype"), cells([*WINDOWS, *SHAPES]))
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
    ("case", "launches"),
    [
        (MBConv(2, (7, 7), mid=64, stride=(2, 2)), 3),  # expand + depthwise, gate, project
        (MBConv(2, (7, 7), mid=64, stride=(2, 2), reduced=None), 2),
        (MBConv(2, (7, 7), mid=64), 4),  # in 16 bits two kernels are faster at stride 1
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
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_value_that_is_not_finite_goes_where_stock_lets_it_go(stride, act, value, dtype):
    case = MBConv(2, (5, 6), cin=17, mid=35, cout=18, act=act, kernel=(3, 3), stride=(stride, stride))
    check_value(native(build(case, dtype)), value, "cuda")


@pytest.mark.parametrize("backend", ["cuda", "mixed"])
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_weight_that_is_not_finite(stride, backend):
    """It makes NaN of the padding, too; beside it a pixel that is not finite."""
    available, reason = backends()[backend] if backend == "mixed" else (True, "")
    if not available:
        pytest.skip(reason)
    case = MBConv(
        2, (15, 14), cin=16, mid=48, cout=16, kernel=(3, 3), stride=(stride, stride), reduced=None, act="relu"
    )
    problem = build(case, torch.bfloat16)
    problem.args[2][0][5, 0, 0, 0] = torch.inf  # of the depthwise convolution
    problem.x[1, 3, 9, 9] = torch.nan
    (expected,), (got,) = problem.call("reference", torch.float64), native(problem).call(backend)
    assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.parametrize(
    ("case", "launches"),
    [
        (MBConv(2, (9, 21), cin=16, mid=48, cout=24, kernel=(3, 3), stride=(2, 2)), 1),  # expand + depthwise
        (MBConv(2, (9, 9), cin=16, mid=48, cout=16, kernel=(5, 5), residual=True), 1),  # depthwise
        (MBConv(3, (7, 7), mid=None, reduced=None), 0),  # a small map
        (MBConv(1, (15, 14), cin=7, mid=9, cout=5, act="relu6", kernel=(3, 3)), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_mixed(case, launches, dtype, emulation):
    """Depthwise convolutions here, the rest in Triton."""
    available, reason = backends()["mixed"]
    if not available:
        pytest.skip(reason)
    oracle.check(native(build(case, dtype)), "mixed")
    if emulation is not None:
        emulation.set_seed(0)
        build(case, dtype).call("mixed")
        assert emulation.launches() == launches


def test_mixed_is_for_16_bits():
    device = on_device(torch.zeros(1)).device.type
    assert mixed.supports(Query("mbconv", device, torch.float32, (3, 3))) == (
        False,
        "only 16 bits have depthwise convolutions on tensor cores",
    )
