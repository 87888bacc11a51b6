"""Infinities, NaN, and values where a careless kernel loses what the contract promises."""

import pytest
import torch

from effnet_kernels import functional as F
from effnet_kernels.functional import BatchNorm
from effnet_kernels.ops.activations import ACTIVATIONS
from tests.ops.cases import Depthwise, Fused, MBConv, Pointwise, Squeeze
from tests.ops.inputs import build
from tests.ops.special_values import (
    check_activation,
    check_depthwise_mean,
    check_pool,
    check_squeeze_in_float16,
    check_value,
    each_value,
)

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@each_value
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
        Fused(2, (16, 17), cin=25, mid=37, cout=18, act="relu6"),
        Fused(2, (18, 15), cin=24, mid=24, cout=None, residual=True),
        MBConv(2, (7, 9), cin=17, mid=35, cout=18, reduced=None),
        MBConv(2, (7, 9), cin=17, mid=35, cout=18),
        MBConv(2, (7, 9), cin=18, mid=34, cout=18),
    ],
    ids=lambda case: f"{type(case).__name__}-{case}",
)
@each_dtype
@torch.no_grad()
def test_a_value_that_is_not_finite_goes_where_stock_lets_it_go(case, value, dtype, backend):
    check_value(build(case, dtype), value, backend)


@pytest.mark.parametrize("act", ACTIVATIONS)
@each_dtype
@torch.no_grad()
def test_activations_over_their_whole_range(act, dtype, backend):
    check_activation(act, dtype, backend)


@each_dtype
@torch.no_grad()
def test_means_are_summed_in_float32(dtype, backend):
    check_depthwise_mean(dtype, backend, size=112)
    check_pool(dtype, backend, size=112)


@torch.no_grad()
def test_the_mean_of_float16_maps_does_not_overflow(backend):
    check_squeeze_in_float16(backend)


@each_dtype
@torch.no_grad()
def test_batch_norm_is_applied_in_float32(dtype, backend):
    """gamma and beta below the resolution of 16 bits at 1 survive where they are given in float32."""
    bn = BatchNorm(torch.tensor([1 + 2.0**-12]), torch.tensor([-1.0]), torch.zeros(1), torch.ones(1), 1e-30)
    x = torch.ones(1, 1, 4, 4, dtype=dtype)
    y = F.pointwise_conv_bn_act(x, torch.ones(1, 1, 1, 1, dtype=dtype), bn, "identity", backend=backend)
    assert torch.equal(y, torch.full_like(y, 2.0**-12))
