"""The depthwise kernel against the float64 reference, by the criterion of docs/numerics.md."""

import itertools

import pytest
import torch

from effnet_kernels import functional as F
from effnet_kernels.dispatch import Query, implementation
from effnet_kernels.ops.activations import ACTIVATIONS
from effnet_kernels.ops.native_cuda import KERNELS, STRIDES
from tests.ops import oracle
from tests.ops.cases import DTYPES, Depthwise, cells
from tests.ops.device import native, on_device
from tests.ops.inputs import build, cast
from tests.ops.special_values import check_depthwise_mean, check_value, each_value, unit_bn
from tests.thinning import in_turns

pytestmark = pytest.mark.usefixtures("poison")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WINDOWS = list(itertools.product(KERNELS, STRIDES))


# More than one block each way, strips that end outside the map, and more than one partial sum down a column.
TILED = [
    Depthwise(2, (33, 40), c=16),
    Depthwise(1, (40, 70), c=8, stride=(2, 2), padding="tf"),
    Depthwise(1, (35, 19), c=72, kernel=(5, 5)),
    Depthwise(1, (17, 131), c=4, kernel=(5, 5)),
    Depthwise(3, (9, 34), c=24, kernel=(5, 5), stride=(2, 2), padding="tf"),
    Depthwise(1, (21, 9), c=264, kernel=(7, 7), padding="none"),
    Depthwise(2, (10, 3), c=1032),
    Depthwise(1, (20, 20), c=37, kernel=(3, 3), padding="large"),
]


@in_turns("window, act, dtype", WINDOWS, ACTIVATIONS, DTYPES)
@torch.no_grad()
def test_every_instance(window, act, dtype):
    """What is compiled separately, or is a branch of its own: vectors of channels and, for odd C, single ones."""
    kernel, stride = window
    for c in (16, 20, 3):
        case = Depthwise(2, (9, 13), act, kernel=kernel, stride=stride, padding="tf", c=c)
        oracle.check(native(build(case, dtype)), "cuda")


@in_turns("c, hw, dtype", [1, 3, 8, 12, 20, 64, 130], [(1, 1), (2, 5), (13, 1), (8, 8)], DTYPES)
@torch.no_grad()
def test_channels_and_small_maps(c, hw, dtype):
    for kernel, stride in WINDOWS:
        oracle.check(native(build(Depthwise(3, hw, kernel=kernel, stride=stride, c=c), dtype)), "cuda")


@pytest.mark.parametrize(("case", "dtype"), cells(TILED))
@torch.no_grad()
def test_many_blocks(case, dtype, schedule):
    oracle.check(native(build(case, dtype)), "cuda")


@pytest.mark.parametrize("case", [Depthwise(3, (19, 37), c=24), Depthwise(3, (19, 20), c=13, kernel=(5, 5))], ids=str)
@each_dtype
@torch.no_grad()
def test_same_bits(case, dtype):
    """On every run, for every batch size, and wherever the map begins: unaligned ones take another kernel."""
    problem = native(build(case, dtype))
    y, mean = problem.call("cuda")
    for again in problem.call("cuda"), problem.call("cuda"):
        assert torch.equal(again[0], y)
        assert torch.equal(again[1], mean)
    x = problem.x
    for n in range(3):
        one = F.depthwise_conv_bn_act(*on_device((x[n : n + 1], *problem.args[1:])), **problem.kwargs, backend="cuda")
        assert torch.equal(one[0].cpu()[0], y[n])
        assert torch.equal(one[1].cpu()[0], mean[n])
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype)
    shifted = buffer[1:].as_strided(x.shape, x.stride()).copy_(x)
    moved = F.depthwise_conv_bn_act(*on_device((shifted, *problem.args[1:])), **problem.kwargs, backend="cuda")
    assert torch.equal(moved[0].cpu(), y)
    assert torch.equal(moved[1].cpu(), mean)


@pytest.mark.parametrize("kernel", [3, 5])
@each_dtype
@torch.no_grad()
def test_a_block_that_sums_more_than_once(kernel, dtype, emulation):
    """On a GPU of one multiprocessor a block takes 32 rows, four partial sums; the bits are those of short blocks.

    In 16 bits a warp then takes several places one after the other.
    """
    if emulation is None:
        pytest.skip("the GPU is what it is")
    problem = native(build(Depthwise(16, (35, 9), c=16, kernel=(kernel, kernel)), dtype))
    expected = problem.call("cuda")
    emulation.set_device(90, multiprocessors=1)
    try:
        for seed in range(3):
            emulation.set_seed(seed)
            assert all(torch.equal(a, b) for a, b in zip(problem.call("cuda"), expected, strict=True))
    finally:
        emulation.set_device(90)


@each_value
@pytest.mark.parametrize("case", [Depthwise(2, (5, 6), c=19, act="relu6"), Depthwise(2, (9, 9), c=16)], ids=str)
@each_dtype
@torch.no_grad()
def test_a_value_that_is_not_finite_goes_where_stock_lets_it_go(case, value, dtype):
    check_value(native(build(case, dtype)), value, "cuda")


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("stride", [1, 2])
@each_dtype
@torch.no_grad()
def test_a_weight_that_is_not_finite(dtype, stride, value):
    """It makes NaN of the padding, too; beside it a pixel that is not finite, under it and elsewhere."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((2, 24, 9, 11), (24, 1, 3, 3)))
    weight[5, 0, 0, 0] = value
    x[0, 5, 1, 0] = x[1, 2, 8, 8] = -torch.inf
    exact = F.depthwise_conv_bn_act(*cast((x, weight, unit_bn(24)), torch.float64), stride=stride, padding=1)
    arguments = on_device((x.to(dtype), weight.to(dtype), unit_bn(24)))
    found = F.depthwise_conv_bn_act(*arguments, stride=stride, padding=1, backend="cuda")
    for got, expected in zip(found, exact, strict=True):
        assert torch.equal(got.cpu().isnan(), expected.isnan())
        assert torch.equal(got.cpu().isinf(), expected.isinf())


@pytest.mark.parametrize("c", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_extremes_of_silu_have_the_same_bits_in_unaligned_memory(c, dtype):
    bn = F.BatchNorm(torch.full((c,), 0.3), torch.full((c,), -88.0), torch.zeros(c), torch.ones(c))
    huge = F.BatchNorm(torch.full((c,), 2.0), torch.zeros(c), torch.zeros(c), torch.ones(c))
    x = torch.randn(1, c, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    x[0, 0, 3, 3] = -torch.finfo(dtype).max
    shifted = torch.empty(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)
    weight = torch.zeros(c, 1, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = 1
    for norm in (bn, huge):
        expected, moved = (
            F.depthwise_conv_bn_act(*on_device((map_, weight, norm)), padding=1, act="silu", backend="cuda")
            for map_ in (x, shifted)
        )
        for a, b in zip(expected, moved, strict=True):
            assert torch.equal(a.cpu().nan_to_num(7.0), b.cpu().nan_to_num(7.0))


@torch.no_grad()
def test_means_are_summed_in_float32():
    check_depthwise_mean(torch.bfloat16, "cuda")


def test_windows_that_are_not_compiled_are_a_reason():
    device = on_device(torch.zeros(1)).device.type
    problem = Query("depthwise_conv_bn_act", device, torch.float16, (3, 3))
    implementation(problem, "cuda")
    with pytest.raises(RuntimeError, match="only kernels of 3x3, 5x5 and 7x7 are compiled, not 3x5"):
        implementation(problem._replace(kernel=(3, 5)), "cuda")
    with pytest.raises(RuntimeError, match="only strides 1 and 2"):
        implementation(problem._replace(stride=(2, 1)), "cuda")
    with pytest.raises(RuntimeError, match="only float32, float16 and bfloat16 have CUDA kernels"):
        implementation(problem._replace(dtype=torch.float64), "cuda")
    with pytest.raises(RuntimeError, match="the tensors are on xpu"):
        implementation(problem._replace(device="xpu"), "cuda")
