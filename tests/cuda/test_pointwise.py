"""``pointwise_conv_bn_act`` in CUDA: every dtype, every tail of a tile, several images in one."""

import re

import pytest
import torch

from effnet_kernels import functional as F
from effnet_kernels.ops.activations import ACTIVATIONS
from tests.cuda.tools import check
from tests.emulation import build
from tests.ops import inputs
from tests.ops.cases import DTYPES, Pointwise, cells
from tests.ops.device import native, on_device
from tests.ops.special_values import check_activation, check_pool, check_value, each_step, each_value, unit_bn
from tests.thinning import in_turns

# Tiles are 128 pixels by 32, 64, 96 or 128 channels, or 64 by 64; a stage holds 32 input channels (16 in fp32).
TILED = [
    Pointwise(1, (8, 16), cin=32, cout=32, act="identity"),  # exactly one tile, one stage
    Pointwise(3, (9, 17), cin=40, cout=144),
    Pointwise(1, (13, 11), cin=200, cout=24, act="identity", gate=True, residual="nhwc"),
    Pointwise(2, (11, 12), cin=33, cout=65, act="relu6", gate=True, residual="sliced"),  # no row of 16 bytes
    Pointwise(1, (11, 12), cin=72, cout=65, act="hardswish"),  # rows of 16 bytes on one side only
    Pointwise(1, (11, 12), cin=65, cout=72, act="relu", residual="nhwc"),
    Pointwise(2, (9, 9), cin=24, cout=256),  # two wide tiles
    Pointwise(2, (9, 15), cin=16, cout=96, residual="nhwc"),  # of 16 threads that store a row four have nothing
    Pointwise(9, (5, 5), cin=48, cout=40, act="identity", gate=True),  # up to seven images in a tile
    Pointwise(150, (1, 1), cin=16, cout=40, gate=True),  # a tile of images
    Pointwise(2, (13, 12), cin=72, cout=130, pool=True),
    Pointwise(2, (12, 11), cin=41, cout=70, act="hardswish", pool=True, gate=True, residual="nchw"),
    Pointwise(3, (7, 7), cin=72, cout=130, pool=True, gate=True),  # two images in a tile
    Pointwise(6, (5, 5), cin=41, cout=70, pool=True, gate=True, residual="nhwc"),  # four
    Pointwise(0, (7, 7), cin=16, cout=24, gate=True, residual="nhwc"),
    Pointwise(0, (7, 7), cin=16, cout=24, pool=True),
    *(Pointwise(2, (5, 5), cin=24, cout=40, act=act, residual="nhwc") for act in ACTIVATIONS),
]


@pytest.mark.parametrize(("case", "dtype"), cells(TILED))
@pytest.mark.usefixtures("poison", "multiprocessors")  # of one, tiles are large for these problems, too
@torch.no_grad()
def test_tiles(case, dtype, emulation):
    check(case, dtype, emulation)


def tile_of(problem, emulation) -> tuple[str, list[torch.Tensor]]:
    """Columns and rows of the tiles that a problem was cut into, and its results."""
    emulation.count(True)
    try:
        results = problem.call("cuda")
        (tile,) = {re.search(r"BlockTile<[^>]*>", kernel)[0] for kernel, *_ in emulation.costs()}
    finally:
        emulation.count(False)
    return tile, results


@pytest.mark.skipif(build.asan_is_loaded(), reason="AddressSanitizer takes the place of the counters")
@in_turns(
    "case_and_tile, dtype",
    [
        (Pointwise(5, (9, 9), cin=200, cout=64, gate=True, residual="nhwc"), "BlockTile<64, 128>"),
        (Pointwise(2, (11, 12), cin=72, cout=130), "BlockTile<96, 128>"),
        (Pointwise(2, (11, 12), cin=72, cout=192, gate=True, residual="nhwc"), "BlockTile<96, 128>"),
        (Pointwise(5, (9, 9), cin=200, cout=112, gate=True), "BlockTile<128, 128>"),
        (Pointwise(2, (11, 12), cin=40, cout=256, act="relu6"), "BlockTile<128, 128>"),
    ],
    DTYPES,
)
@torch.no_grad()
def test_all_tiles_compute_the_same_bits(case_and_tile, dtype, emulation):
    """How many blocks a batch makes decides on the tile; an image must not notice the others by it."""
    case, large = case_and_tile
    if emulation is None:
        pytest.skip("the GPU is what it is")
    problem = native(inputs.build(case, dtype))
    small_tile, small = tile_of(problem, emulation)
    emulation.set_device(90, multiprocessors=1)
    try:
        large_tile, got = tile_of(problem, emulation)
    finally:
        emulation.set_device(90)
    assert small_tile == "BlockTile<64, 64>"
    assert large_tile == (large if dtype != torch.float32 else "BlockTile<64, 128>")
    assert all(torch.equal(a, b) for a, b in zip(got, small, strict=True))


@in_turns("gate, size, dtype", [False, True], [(5, 5), (7, 7), (12, 12)], DTYPES)
@torch.no_grad()
def test_an_image_is_pooled_alone(gate, size, dtype):
    """Wherever it lies in a tile, and whatever lies beside it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 72, *size, generator=generator).to(dtype)
    weight = torch.randn(70, 72, 1, 1, generator=generator).to(dtype)
    factor = torch.rand(5, 72, generator=generator)
    x, weight, factor, bn = on_device((x, weight, factor, unit_bn(70)))

    def pooled(images: slice) -> torch.Tensor:
        part = x[images].contiguous(memory_format=torch.channels_last)
        scale = factor[images].contiguous() if gate else None
        return F.pointwise_conv_bn_act(part, weight, bn, "silu", gate=scale, pool=True, backend="cuda")

    alone = torch.cat([pooled(slice(i, i + 1)) for i in range(5)])
    assert torch.equal(pooled(slice(0, 5)), alone)
    x[1] = torch.nan
    others = [0, 2, 3, 4]
    assert torch.equal(pooled(slice(0, 5))[others], alone[others])


@each_step
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_activations_over_their_whole_range(act, dtype, step):
    check_activation(act, dtype, "cuda", step)


@each_value
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Pointwise(2, (5, 5), cin=17, cout=19, act="relu"),
        Pointwise(2, (5, 5), cin=16, cout=24, gate=True),
        Pointwise(2, (5, 5), cin=17, cout=19, pool=True),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_value_that_is_not_finite_goes_where_stock_lets_it_go(case, value, dtype):
    check_value(native(inputs.build(case, dtype)), value, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_pool_adds_in_float32(dtype):
    check_pool(dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_maps_that_are_not_aligned(dtype):
    """Views that begin in the middle of 16 bytes are read element by element."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 + 2 * 9 * 24, generator=generator).to(dtype)[1:].view(2, 3, 3, 24).permute(0, 3, 1, 2)
    weight = torch.randn(1 + 40 * 24, generator=generator).to(dtype)[1:].view(40, 24, 1, 1)
    residual = torch.randn(1 + 2 * 9 * 40, generator=generator).to(dtype)[1:].view(2, 3, 3, 40).permute(0, 3, 1, 2)
    x, weight, residual, bn = on_device((x, weight, residual, unit_bn(40)))
    whole = [t.clone(memory_format=torch.channels_last) for t in (x, weight, residual)]
    assert x.data_ptr() % 16
    got = F.pointwise_conv_bn_act(x, weight, bn, "silu", residual=residual, backend="cuda")
    expected = F.pointwise_conv_bn_act(whole[0], whole[1], bn, "silu", residual=whole[2], backend="cuda")
    assert torch.equal(got, expected)
