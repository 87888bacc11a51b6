"""What every backend does with infinities and NaN, and where a careless kernel loses what the contract promises."""

import math

import pytest
import torch

from effnet_kernels import functional as F
from effnet_kernels.functional import BatchNorm, SqueezeExciteWeights
from tests.ops import oracle
from tests.ops.device import for_backend
from tests.ops.inputs import Problem

each_value = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)


def unit_bn(c: int, beta: float = 0.0) -> BatchNorm:
    """Batch normalisation that only adds ``beta``."""
    return BatchNorm(torch.ones(c), torch.full((c,), beta), torch.zeros(c), torch.ones(c), 1e-30)


def check_value(problem: Problem, value: float, backend: str) -> None:
    """In one pixel of one channel of the last image: what it does not reach stays finite, and right."""
    clean = problem.call(backend)
    problem.x[-1, 1, 2, 2] = value
    for name, got, before, expected in zip(
        problem.outputs, problem.call(backend), clean, oracle.stock(problem.x, problem.steps), strict=True
    ):
        assert torch.equal(got.isnan(), expected.isnan()), f"{name}: NaN in other places than stock"
        assert torch.equal(got.isinf(), expected.isinf()), f"{name}: inf in other places than stock"
        assert torch.equal(got[0], before[0]), f"{name}: the other image changed"
        assert not torch.equal(got[-1], before[-1]), f"{name}: the value made no difference"


def check_activation(act: str, dtype: torch.dtype, backend: str, step: int = 1) -> None:
    """Every bfloat16 number, or one in `step`, up to 2^120 that the dtype holds, infinities and NaN, through a
    convolution of one channel that changes nothing."""
    z = torch.arange(-(2**15), 2**15, step, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    z = z[z.abs() < min(2.0**120, torch.finfo(dtype).max)]
    z = torch.cat([z, torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=torch.bfloat16)]).to(dtype)
    x, weight, bn = for_backend((z.view(1, 1, 1, -1), torch.ones(1, 1, 1, 1, dtype=dtype), unit_bn(1)), backend)
    got = F.pointwise_conv_bn_act(x, weight, bn, act, backend=backend).cpu().flatten()
    exact = oracle.ACTIVATION[act](z.double())
    stock = oracle.ACTIVATION[act](z)
    assert torch.equal(got.isnan(), stock.isnan())
    assert torch.equal(got.isinf(), stock.isinf())
    # Element by element: twice stock's error, four roundings of the result, and subnormals may be flushed.
    finfo = torch.finfo(dtype)
    allowed = 2 * (stock.double() - exact).abs() + 2 * finfo.eps * exact.abs() + finfo.tiny
    wrong = (got.double() - exact).abs() > allowed  # False where NaN
    assert not wrong.any(), f"act({z[wrong][0]}) = {got[wrong][0]}, {exact[wrong][0]}"


def check_depthwise_mean(dtype: torch.dtype, backend: str, size: int = 64) -> None:
    """The mean of ones: a bfloat16 sum stops at 256, a float16 sum at 2048."""
    weight = torch.zeros(8, 1, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = 1
    x, weight, bn = for_backend((torch.ones(1, 8, size, size, dtype=dtype), weight, unit_bn(8)), backend)
    _, mean = F.depthwise_conv_bn_act(x, weight, bn, "identity", padding=(1, 1, 1, 1), backend=backend)
    assert torch.equal(mean.cpu(), torch.ones(1, 8))


def check_pool(dtype: torch.dtype, backend: str, size: int = 48) -> None:
    """The mean of fives: a bfloat16 sum stops at 256, a float16 sum at 2048."""
    x, weight = torch.ones(1, 5, size, size, dtype=dtype), torch.ones(3, 5, 1, 1, dtype=dtype)
    x, weight, bn = for_backend((x, weight, unit_bn(3)), backend)
    pooled = F.pointwise_conv_bn_act(x, weight, bn, "identity", pool=True, backend=backend)
    assert torch.equal(pooled.cpu(), torch.full((1, 3), 5.0, dtype=dtype))


def check_squeeze_in_float16(backend: str) -> None:
    """The sum of a map of large values overflows float16."""
    zero = SqueezeExciteWeights(torch.zeros(2, 4, 1, 1), torch.zeros(2), torch.zeros(4, 2, 1, 1), torch.zeros(4))
    large = torch.full((1, 4, 32, 32), 6e4, dtype=torch.float16)
    x, zero = for_backend((large, zero), backend)
    assert torch.equal(F.squeeze_excite(x, zero, backend=backend).cpu(), large / 2)
