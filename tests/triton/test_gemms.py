"""The kernels with matrix products where one tile is not enough, and what their prologues and epilogues promise."""

import pytest
import torch

from effnet_kernels.ops import fused_mbconv_triton as fused
from effnet_kernels.ops import triton_common
from effnet_kernels.ops.fused_mbconv_triton import FLAT_BELOW
from tests.ops import oracle
from tests.ops.cases import Fused, Pointwise
from tests.ops.device import native, on_device
from tests.ops.inputs import build
from tests.ops.special_values import check_pool, check_value, each_value
from tests.thinning import daily

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TILED = [
    (Pointwise(3, (9, 17), cin=40, cout=144), BF16),
    (Pointwise(2, (13, 11), cin=144, cout=24, act="identity", gate=True, residual="nhwc"), FP32),
    (Pointwise(2, (13, 11), cin=144, cout=24, act="identity", gate=True, residual="nhwc"), FP16),
    (Pointwise(2, (9, 9), cin=70, cout=200, act="identity", gate=True), BF16),  # images end inside tiles
    (Pointwise(2, (13, 12), cin=72, cout=300, pool=True), BF16),
    (Pointwise(2, (9, 8), cin=72, cout=72, act="hardswish", pool=True, gate=True, residual="nchw"), FP32),
    (Fused(2, (13, 11), cin=24, mid=24, cout=None, residual=True), BF16),
    (Fused(2, (9, 11), cin=16, mid=40, cout=24, stride=(2, 2), padding="tf"), FP32),
    (Fused(3, (9, 11), cin=20, mid=100, cout=40, stride=(2, 2), padding="tf"), FP16),
    (Fused(2, (9, 10), cin=48, mid=144, cout=48, residual=True), BF16),
    (Fused(1, (7, 9), cin=32, mid=40, cout=136, kernel=(5, 5), stride=(2, 2)), BF16),  # two tiles of outputs
    (Fused(2, (24, 25), cin=3, mid=40, cout=None, stride=(2, 2), padding="tf", layout="nchw"), FP32),
    (Fused(1, (12, 13), cin=FLAT_BELOW - 1, mid=24, cout=FLAT_BELOW - 1, residual=True), FP16),
]


@pytest.mark.parametrize(("case", "dtype"), daily(TILED, TILED[::2]))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_many_tiles(case, dtype):
    problem = native(build(case, dtype))
    oracle.check(problem, "triton")
    for got, again in zip(problem.call("triton"), problem.call("triton"), strict=True):
        assert torch.equal(got, again), "two runs differ"


@pytest.mark.parametrize("cin", [18, 24])  # copied by 4 and by 8 bytes
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_tiles_of_256_expanded_channels(cin, dtype, monkeypatch):
    """Those of Hopper and Blackwell, whose x is copied through the L1."""
    monkeypatch.setattr(triton_common, "chosen", {})
    monkeypatch.setattr(fused, "default_config", lambda *_: triton_common.Config((128, 256, 32, 16), 16, 5))
    oracle.check(native(build(Fused(2, (9, 11), cin=cin, mid=130, cout=cin, residual=True), dtype)), "triton")


@each_value
@pytest.mark.parametrize(
    "case",
    [
        Pointwise(2, (5, 5), cin=17, cout=19),
        Pointwise(2, (5, 5), cin=17, cout=19, gate=True),
        Pointwise(2, (5, 5), cin=17, cout=19, pool=True),
        Fused(2, (5, 6), cin=17, mid=19, cout=18),
        Fused(2, (5, 6), cin=17, mid=19, cout=18, act="relu"),
        Fused(2, (5, 6), cin=3, mid=19, cout=None, act="relu"),
    ],
    ids=lambda case: f"{type(case).__name__}-{case}",
)
@torch.no_grad()
def test_a_value_that_is_not_finite_goes_where_stock_lets_it_go(case, value):
    check_value(native(build(case, torch.float32)), value, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_pool_adds_in_float32(dtype):
    check_pool(dtype, "triton")


@torch.no_grad()
def test_a_planar_image_costs_the_stem_no_pass(monkeypatch):
    """What reaches the kernel is the image itself, strides and all."""
    reached = []
    launch = triton_common.launch_kernel
    monkeypatch.setattr(
        triton_common,
        "launch_kernel",
        lambda kernel, programs, tensors, *rest: (reached.append(tensors), launch(kernel, programs, tensors, *rest)),
    )
    problem = native(build(Fused(2, (8, 9), cin=3, mid=12, cout=None, stride=(2, 2), layout="nchw"), torch.float32))
    oracle.check(problem, "triton")
    assert reached[0][1].stride() == problem.x.stride()


@torch.no_grad()
def test_planes_of_a_stem_farther_apart_than_32_bits_count(tmp_path):
    """Channel 2 lies 2^31 elements and more behind channel 0. Counted in 32 bits it would lie as far before it."""
    problem = build(Fused(1, (6, 7), cin=3, mid=12, cout=None, stride=(2, 2), layout="nchw"), FP16)
    x, *rest = on_device(problem.args)
    size = 2**32 + 2**10
    if x.is_cuda:
        memory = torch.zeros(size, dtype=FP16, device=x.device)
    else:
        memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=FP16)
    far = memory.as_strided((1, 3, 6, 7), (0, 2**30 + 8, 7, 1), 2**31).copy_(x)
    got = problem.function(far, *rest, **problem.kwargs, backend="triton").cpu()
    assert torch.equal(got, native(problem).call("triton")[0])
