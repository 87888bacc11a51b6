"""Infinities, NaN, and values where a careless kernel loses what the contract promises."""

import math

import pytest
import torch

from effnet_kernels import functional as F
from effnet_kernels.functional import BatchNorm, SqueezeExciteWeights
from effnet_kernels.ops.activations import ACTIVATIONS
from tests.ops import oracle
from tests.ops.cases import Depthwise, Fused, MBConv, Pointwise, Squeeze
from tests.ops.inputs import build, serves

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def unit_bn(c: int, beta: float = 0.0) -> BatchNorm:
    """Batch normalisation that only adds ``beta``."""
    return BatchNorm(torch.ones(c), torch.full((c,), beta), torch.zeros(c), torch.ones(c), 1e-30)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Pointwise(2, (5, 5), cin=17, cout=19),
        Pointwise(2, (5, 5), cin=17, cout=19, pool=True),
        Pointwise(2, (5, 5), cin=18, cout=19),  # no padding between one pixel and the next
        Depthwise(2, (7, 9), c=19, act="relu6"),
        Depthwise(2, (7, 9), c=19, act="hardswish", kernel=(5, 5), stride=(2, 2)),
        Squeeze(2, (5, 5), c=19),
        Fused(2, (7, 9), cin=17, mid=19, cout=18),
        Fused(2, (7, 9), cin=18, mid=34, cout=18),
        Fused(2, (7, 9), cin=3, mid=19, cout=None, act="relu"),
        MBConv(2, (7, 9), cin=17, mid=35, cout=18, reduced=None),
        MBConv(2, (7, 9), cin=17, mid=35, cout=18),
        MBConv(2, (7, 9), cin=18, mid=34, cout=18),
    ],
    ids=lambda case: f"{type(case).__name__}-{case}",
)
@each_dtype
@torch.no_grad()
def test_a_value_that_is_not_finite_goes_where_stock_lets_it_go(case, value, dtype, backend):
    """One pixel of one channel of the last image: what it does not reach stays finite, and right."""
    problem = build(case, dtype)
    clean = problem.call(backend)
    problem.x[-1, 1, 2, 2] = value
    for name, got, before, expected in zip(
        problem.outputs, problem.call(backend), clean, oracle.stock(problem.x, problem.steps), strict=True
    ):
        assert torch.equal(got.isnan(), expected.isnan()), f"{name}: NaN in other places than stock"
        assert torch.equal(got.isinf(), expected.isinf()), f"{name}: inf in other places than stock"
        assert torch.equal(got[0], before[0]), f"{name}: the other image changed"
        assert not torch.equal(got[-1], before[-1]), f"{name}: the value made no difference"


@pytest.mark.parametrize("act", ACTIVATIONS)
@each_dtype
@torch.no_grad()
def test_activations_over_their_whole_range(act, dtype, backend):
    """Every bfloat16 number up to 2^120 as the argument, through a convolution that changes nothing."""
    z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    z = z[z.abs() < 2.0**120]
    z = z[: len(z) // 8 * 8].to(dtype).view(1, 1, 8, -1)
    got = F.pointwise_conv_bn_act(z, torch.ones(1, 1, 1, 1, dtype=dtype), unit_bn(1), act, backend=backend)
    exact = oracle.ACTIVATION[act](z.double())
    stock = oracle.ACTIVATION[act](z)
    # Element by element: twice stock's error, four roundings of the result, and subnormals may be flushed.
    finfo = torch.finfo(dtype)
    allowed = 2 * (stock.double() - exact).abs() + 2 * finfo.eps * exact.abs() + finfo.tiny
    error = (got.double() - exact).abs()
    worst = int((error / allowed).argmax())
    assert (error <= allowed).all(), f"act({z.flatten()[worst]}) = {got.flatten()[worst]}, {exact.flatten()[worst]}"


@each_dtype
@torch.no_grad()
def test_means_are_summed_in_float32(dtype, backend):
    """12544 ones: a bfloat16 sum stops at 256, a float16 sum at 2048."""
    x = torch.ones(1, 5, 112, 112, dtype=dtype)
    weight = torch.ones(5, 1, 1, 1, dtype=dtype)
    _, mean = F.depthwise_conv_bn_act(x, weight, unit_bn(5), "identity", backend=backend)
    assert torch.equal(mean, torch.ones(1, 5))
    pooled = F.pointwise_conv_bn_act(
        x, torch.ones(3, 5, 1, 1, dtype=dtype), unit_bn(3), "identity", pool=True, backend=backend
    )
    assert torch.equal(pooled, torch.full((1, 3), 5.0, dtype=dtype))


@torch.no_grad()
def test_the_mean_of_float16_maps_does_not_overflow(backend):
    serves(backend, "squeeze_excite", torch.float16)
    x = torch.full((1, 4, 32, 32), 6e4, dtype=torch.float16)
    zero = SqueezeExciteWeights(torch.zeros(2, 4, 1, 1), torch.zeros(2), torch.zeros(4, 2, 1, 1), torch.zeros(4))
    assert torch.equal(F.squeeze_excite(x, zero, backend=backend), x / 2)


@each_dtype
@torch.no_grad()
def test_batch_norm_is_applied_in_float32(dtype, backend):
    """gamma and beta below bfloat16's resolution at 1 survive where they are given in float32."""
    bn = BatchNorm(torch.tensor([1 + 2.0**-12]), torch.tensor([-1.0]), torch.zeros(1), torch.ones(1), 1e-30)
    x = torch.ones(1, 1, 4, 4, dtype=dtype)
    y = F.pointwise_conv_bn_act(x, torch.ones(1, 1, 1, 1, dtype=dtype), bn, "identity", backend=backend)
    assert torch.equal(y, torch.full_like(y, 2.0**-12))
