"""What every backend does with infinities and NaN, and where a careless kernel loses what the contract promises."""

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from effnet_kernels import functional as F
from effnet_kernels.functional import BatchNorm, SqueezeExciteWeights
from tests import criterion
from tests.ops import oracle
from tests.ops.device import for_backend
from tests.ops.inputs import Problem, cast
from tests.thinning import daily

# One in nine numbers where an emulation or an interpreter is slow.
each_step = pytest.mark.parametrize("step", daily([9, 1], [9]))
each_value = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)


@contextlib.contextmanager
def lost_convolutions() -> Iterator[None]:
    """A library whose convolutions of 16 bits are NaN everywhere, as oneDNN's are in places on some processors."""

    def lost(function):
        def call(x, weight, *args, **kwargs):
            result = function(x, weight, *args, **kwargs)
            for t in tree_leaves(result):
                if t is not None and t.dtype in (torch.bfloat16, torch.float16):
                    t.fill_(math.nan)
            return result

        return call

    backward = torch.ops.aten.convolution_backward
    with (
        mock.patch.object(torch.nn.functional, "conv2d", lost(torch.nn.functional.conv2d)),
        mock.patch.object(backward, "default", lost(backward.default)),
    ):
        yield


def unit_bn(c: int, beta: float = 0.0) -> BatchNorm:
    """Batch normalisation that only adds ``beta``."""
    return BatchNorm(torch.ones(c), torch.full((c,), beta), torch.zeros(c), torch.ones(c), 1e-30)


def check_value(problem: Problem, value: float, backend: str) -> None:
    """In one pixel of one channel of the last image: where it goes is said by the reference in float64.

    And by stock layers in float64, so that the reference is not its own judge.
    """

    def outputs() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(problem.call(backend), problem.call("reference", torch.float64), strict=True))

    clean = outputs()
    problem.x[-1, 1, 2, 2] = value
    dirty = outputs()
    for name, (before, exact_before), (got, exact) in zip(problem.outputs, clean, dirty, strict=True):
        rounded, same = exact.to(got.dtype), exact == exact_before
        assert torch.equal(got.isnan(), rounded.isnan()), f"{name}: NaN in other places than the reference"
        assert torch.equal(got.isinf(), rounded.isinf()), f"{name}: inf in other places than the reference"
        assert torch.equal(got[same], before[same]), f"{name}: changed where the value does not reach"
        assert same[0].all(), f"{name}: the other image"
        assert not torch.equal(got[-1], before[-1]), f"{name}: the value made no difference"
    stock = oracle.stock(*cast((problem.x, problem.steps), torch.float64))
    for name, (_, exact), expected in zip(problem.outputs, dirty, stock, strict=True):
        assert torch.equal(exact.isnan(), expected.isnan()), f"{name}: the reference has NaN in other places than stock"
        assert torch.equal(exact.isinf(), expected.isinf()), f"{name}: the reference has inf in other places than stock"


def check_activation(act: str, dtype: torch.dtype, backend: str, step: int = 1) -> None:
    """Every bfloat16 number, or one in `step`, up to 2^120 that the dtype holds, infinities and NaN, through a
    convolution of one channel that changes nothing."""
    z = torch.arange(-(2**15), 2**15, step, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    z = z[z.abs() < min(2.0**120, torch.finfo(dtype).max)]
    z = torch.cat([z, torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=torch.bfloat16)]).to(dtype)
    x, weight, bn = for_backend((z.view(1, 1, 1, -1), torch.ones(1, 1, 1, 1, dtype=dtype), unit_bn(1)), backend)
    got = F.pointwise_conv_bn_act(x, weight, bn, act, backend=backend).cpu().flatten()
    exact = oracle.ACTIVATION[act](z.double())
    rounded, finite = exact.to(dtype), exact.isfinite()
    assert torch.equal(got.isnan(), rounded.isnan())
    assert torch.equal(got.isinf(), rounded.isinf())
    z, got, exact = z[finite], got[finite], exact[finite]
    # Element by element: twice stock's error, four roundings of the result, and subnormals may be flushed.
    finfo = torch.finfo(dtype)
    stock = criterion.stock_error(oracle.ACTIVATION[act](z), exact)
    allowed = 2 * stock + 2 * finfo.eps * exact.abs() + finfo.tiny
    wrong = (got.double() - exact).abs() > allowed
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
