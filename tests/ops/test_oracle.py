"""The judge itself: the references are the stock layers, and wrong answers are rejected."""

import pytest
import torch

from tests.ops import oracle
from tests.ops.cases import Case, Depthwise, Fused, MBConv, Pointwise, Squeeze, hostile
from tests.ops.inputs import SAMPLES, build, cast, sample


@pytest.mark.parametrize("kind", [Pointwise, Depthwise, Squeeze, Fused, MBConv], ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_references_compute_what_stock_layers_compute(kind: type[Case]):
    """In float64, where both are right to 2^-53: within six standard deviations of that rounding."""
    for case in hostile(kind):
        if case.n == 0:
            continue
        problem = build(case, torch.float32)
        x, steps = cast((problem.x, problem.steps), torch.float64)
        sigma = oracle.noise(x, steps, torch.float64)
        for name, got, stock, s in zip(
            problem.outputs, problem.call("reference", torch.float64), oracle.stock(x, steps), sigma, strict=True
        ):
            oracle.assert_close(f"{case}: {name}", got, stock, 6 * oracle.per_channel(s) + torch.finfo(x.dtype).tiny)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_wrong_element_is_rejected(name, dtype):
    """One element of the last channel is off by one part in 16 (bfloat16) or 2^15 (float32) of the channel."""
    if "gate" in name:
        dtype = torch.float32
    problem = sample(name, dtype)
    for expected, got in zip(problem.expected, problem.call("reference"), strict=True):
        oracle.assert_close("y", got, expected.exact, expected.allowed)
        wrong = got.clone()
        step = 2.0**-4 if dtype == torch.bfloat16 else 2.0**-15
        index = (-1,) * got.dim()
        wrong[index] += 2 * step * oracle.per_channel(expected.exact)[-1]
        with pytest.raises(AssertionError, match="is allowed, in channel"):
            oracle.assert_close("y", wrong, expected.exact, expected.allowed)
        wrong[index] = torch.nan
        with pytest.raises(AssertionError, match=r"1 of .* not finite"):
            oracle.assert_close("y", wrong, expected.exact, expected.allowed)


def test_wrong_layouts_are_rejected():
    nchw = torch.zeros(2, 3, 4, 5)
    with pytest.raises(AssertionError, match="strides"):
        oracle.assert_layout("y", nchw, [])
    nhwc = nchw.contiguous(memory_format=torch.channels_last)
    with pytest.raises(AssertionError, match="aliases"):
        oracle.assert_layout("y", nhwc, [nhwc[:1]])
    oracle.assert_layout("y", nhwc, [nchw])
