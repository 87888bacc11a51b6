"""``fused_mbconv`` in CUDA: rectangles of output pixels, chunks of expanded channels, parts of the input channels."""

import pytest
import torch

from effnet_kernels import functional as F
from tests.cuda.tools import check, cycled
from tests.ops import oracle
from tests.ops.cases import DTYPES, Fused
from tests.ops.device import native
from tests.ops.inputs import build
from tests.ops.special_values import check_value, each_value

# A block has up to 128 pixels; chunks are 64 expanded channels; 64 output channels, or 128 in 16 bits.
TILED = [
    Fused(1, (13, 11), cin=24, mid=24, cout=None, residual=True),
    Fused(2, (9, 11), cin=16, mid=40, cout=24, stride=(2, 2), padding="tf"),
    Fused(1, (9, 11), cin=20, mid=100, cout=40, stride=(2, 2), padding="tf"),  # no row of 16 bytes in x
    Fused(1, (9, 18), cin=48, mid=144, cout=48, residual=True),  # three chunks, the last one not full
    Fused(1, (7, 9), cin=32, mid=40, cout=136, kernel=(5, 5), stride=(2, 2)),  # two tiles of outputs
    Fused(1, (8, 9), cin=32, mid=70, cout=66, act="relu6"),
    Fused(1, (24, 25), cin=3, mid=40, cout=None, stride=(2, 2), padding="tf", layout="nchw"),
    Fused(1, (12, 13), cin=15, mid=24, cout=15, residual=True, act="hardswish"),
    Fused(1, (9, 13), cin=16, mid=200, cout=24, kernel=(1, 1)),  # a chunk is one step
    Fused(0, (7, 7), cin=8, mid=24, cout=8),
]
# At 99 KB of shared memory a rectangle holds only a part of these input channels.
PARTS = [
    Fused(1, (11, 13), cin=200, mid=72, cout=70, stride=(2, 2)),
    Fused(1, (9, 9), cin=168, mid=24, cout=None, kernel=(5, 5), stride=(2, 2)),
]
# Those whose weights stay in shared memory, or in registers; tiles are of 8 x 8.
RESIDENT = [
    Fused(3, (17, 9), cin=24, mid=24, cout=None, residual=True),
    Fused(2, (9, 18), cin=32, mid=32, cout=None, residual=True, act="relu"),
    Fused(2, (8, 25), cin=32, mid=16, cout=None, act="hardswish"),
    Fused(2, (33, 18), cin=16, mid=64, cout=32, stride=(2, 2)),
    Fused(3, (35, 17), cin=24, mid=96, cout=48, stride=(2, 2), padding="tf"),
    Fused(2, (17, 10), cin=32, mid=128, cout=32, residual=True),
    Fused(2, (31, 34), cin=32, mid=128, cout=48, stride=(2, 2), padding="tf"),
    Fused(1, (34, 33), cin=32, mid=128, cout=64, stride=(2, 2), padding="none"),
    Fused(3, (17, 15), cin=48, mid=192, cout=48, residual=True),
    Fused(1, (13, 11), cin=48, mid=192, cout=48, padding=(0, 2, 2, 0), residual=True, act="relu6"),
    Fused(2, (9, 9), cin=48, mid=192, cout=48, padding="none", layout="sliced"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TILED, ids=str)
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_tiles(case, dtype, emulation):
    check(case, dtype, emulation)


@pytest.fixture(params=[0, 1])
def multiprocessors(request, emulation):
    """Of the GPU, or one, on which a team has several tiles."""
    if request.param == 0:
        yield
        return
    if emulation is None:
        pytest.skip("the GPU is what it is")
    emulation.set_device(90, multiprocessors=1)
    yield
    emulation.set_device(90)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RESIDENT, ids=str)
@pytest.mark.usefixtures("poison", "multiprocessors")
@torch.no_grad()
def test_resident_weights(case, dtype, emulation):
    check(case, dtype, emulation)


@pytest.mark.parametrize("case", PARTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_parts_of_the_input_channels(case, dtype, emulation, device):
    check(case, dtype, emulation, seeds=1)


@pytest.mark.parametrize(("case", "dtype"), cycled(Fused))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_hostile(case, dtype):
    oracle.check(native(build(case, dtype)), "cuda")


@each_value
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Fused(2, (5, 6), cin=17, mid=19, cout=18),
        Fused(2, (5, 6), cin=17, mid=19, cout=18, act="relu"),
        Fused(2, (5, 6), cin=3, mid=19, cout=None, act="relu"),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_value_that_is_not_finite_goes_where_stock_lets_it_go(case, value, dtype):
    check_value(native(build(case, dtype)), value, "cuda")


@torch.no_grad()
def test_a_window_too_large_for_shared_memory_is_refused(device):
    """By name, before anything runs."""
    problem = native(build(Fused(1, (99, 99), cin=16, mid=16, cout=16, kernel=(99, 99), padding="none"), torch.float32))
    with pytest.raises(RuntimeError, match="fused_mbconv: the window of one output pixel does not fit"):
        problem.call("cuda")


@torch.no_grad()
def test_one_launch(emulation):
    """A block is one kernel, and a planar image costs a stem no pass."""
    if emulation is None:
        pytest.skip("launches are counted by the emulation")
    problem = build(Fused(1, (8, 9), cin=3, mid=12, cout=None, stride=(2, 2), layout="nchw"), torch.float32)
    emulation.set_seed(0)
    F.fused_mbconv(*problem.args, **problem.kwargs, backend="cuda")
    assert emulation.launches() == 1
