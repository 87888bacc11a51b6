"""SiLU and sigmoid number by number: the error that docs/numerics.md states, in units of the last place."""

import pytest
import torch

from effnet_kernels import functional as F
from effnet_kernels.functional import SqueezeExciteWeights
from tests.ops.special_values import unit_bn

ULPS = 2.01


def numbers() -> torch.Tensor:
    """Every 1999th float32, of either sign, that is finite."""
    x = torch.arange(-(2**31), 2**31, 1999).to(torch.int32).view(torch.float32)
    return x[x.isfinite()]


def ulps(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Error in units of the last place of the exact result; 0 where that is subnormal and so is the result."""
    tiny = torch.finfo(torch.float32).tiny
    unit = 2.0 ** (exact.abs().clamp(tiny).log2().floor() - 23)
    error = (got.double() - exact).abs() / unit
    return error.where((exact.abs() >= tiny) | (got.abs() > 2 * tiny), 0)


@torch.no_grad()
def test_silu(backend):
    x = numbers()
    x = x[: len(x) // 16 * 16]
    x = x[(x > -87) | (x < -104)]  # between them exp(-x) overflows, in stock layers as well
    x = x[: len(x) // 16 * 16].view(1, 16, 1, -1)
    y, _ = F.depthwise_conv_bn_act(x, torch.ones(16, 1, 1, 1), unit_bn(16), "silu", backend=backend)
    exact = x.double() * x.double().sigmoid()
    error = ulps(y, exact)
    assert error.max() <= ULPS, f"{error.max():.3f} ulp at {x.flatten()[error.argmax()]}"


@torch.no_grad()
def test_silu_of_every_bfloat16(backend):
    """Off by 2^-11 of it at most, before it is rounded to 8 bits."""
    x = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    x = x[x.isfinite()]
    x = x[(x > -87) | (x < -104)]
    x = x[: len(x) // 16 * 16].view(1, 16, 1, -1)
    y, _ = F.depthwise_conv_bn_act(x, torch.ones(16, 1, 1, 1, dtype=x.dtype), unit_bn(16), "silu", backend=backend)
    exact, tiny = x.double() * x.double().sigmoid(), torch.finfo(x.dtype).tiny
    unit = 2.0 ** (exact.abs().clamp(tiny).log2().floor() - 7)
    error = (y.double() - exact).abs().where((exact.abs() >= tiny) | (y.abs() > 2 * tiny), 0)
    excess = error - (unit / 2 + exact.abs() * 2.0**-11)
    assert excess.max() <= 0, f"{(error / unit).flatten()[excess.argmax()]:.3f} units at {x.flatten()[excess.argmax()]}"


@torch.no_grad()
def test_sigmoid(backend):
    mean = numbers()
    mean = mean[(mean > -87) | (mean < -104)][:, None]
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1)
    gate = F.squeeze_excite_gate(mean, SqueezeExciteWeights(one, zero, one, zero, "identity"), backend=backend)
    exact = mean.double().sigmoid()
    error = ulps(gate, exact)
    assert error.max() <= ULPS, f"{error.max():.3f} ulp at {mean[error.argmax()]}"


@pytest.mark.parametrize("act", ["silu", "hardswish", "relu6"])
@torch.no_grad()
def test_subnormal_numbers(act, backend):
    """They are computed with, not flushed."""
    x = torch.full((1, 16, 1, 8), 1e-40)
    y, _ = F.depthwise_conv_bn_act(x, torch.ones(16, 1, 1, 1), unit_bn(16), act, backend=backend)
    factor = {"silu": 0.5, "hardswish": 0.5, "relu6": 1.0}[act]
    torch.testing.assert_close(y.double(), x.double() * factor, rtol=0, atol=2e-45)
