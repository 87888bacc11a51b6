"""The judge itself: the references are the stock layers, and wrong answers are rejected."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests import criterion
from tests.criterion import assert_as_accurate
from tests.ops import oracle
from tests.ops.cases import DTYPES, KINDS, Case, dealt, few_cells, fits, hostile
from tests.ops.inputs import SAMPLES, build, cast, sample
from tests.ops.special_values import check_value, each_value, lost_convolutions


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
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
            allowed = 6 * criterion.per_channel(s) + torch.finfo(x.dtype).tiny
            criterion.assert_close(f"{case}: {name}", got, stock, allowed)
            oracle.assert_layout(f"{case}: {name}", got, problem.tensors)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_wrong_element_is_rejected(name, dtype):
    """One element of the last channel is off by one part in 16 (bfloat16), 64 (float16), 2^15 (float32) of it."""
    if "gate" in name:
        dtype = torch.float32
    problem = sample(name, dtype)
    for expected, got in zip(problem.expected, oracle.check(problem, "reference"), strict=True):
        wrong = got.clone()
        step = {torch.bfloat16: 2.0**-4, torch.float16: 2.0**-6, torch.float32: 2.0**-15}[dtype]
        index = (-1,) * got.dim()
        wrong[index] += 2 * step * criterion.per_channel(expected.exact)[-1]
        with pytest.raises(AssertionError, match="is allowed, in channel"):
            criterion.assert_close("y", wrong, expected.exact, expected.allowed)
        wrong[index] = torch.nan
        with pytest.raises(AssertionError, match=r"1 of .* not finite"):
            criterion.assert_close("y", wrong, expected.exact, expected.allowed)


MAPS = [name for name in SAMPLES if "gate" not in name]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_convolutions_of_16_bits_define_nothing(name, dtype):
    """What is right, what may be off and what the reference gives are the same without them."""
    problem, same = sample(name, dtype), sample(name, dtype)
    with lost_convolutions():
        assert F.conv2d(torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)).isnan().all()
        oracle.check(problem, "reference")
    for a, b in zip(problem.expected, same.expected, strict=True):
        assert torch.equal(a.exact, b.exact)
        assert torch.equal(a.allowed, b.allowed)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_value
@torch.no_grad()
def test_where_stock_is_not_finite_the_derived_noise_alone_is_allowed(name, dtype, value, monkeypatch):
    problem, stock = sample(name, dtype), oracle.stock

    def lost(x, steps):
        outputs = stock(x, steps)
        for y in outputs:
            y[(-1,) * y.dim()] = value
        return outputs

    monkeypatch.setattr(oracle, "stock", lost)
    sigma = oracle.noise(problem.x.double(), cast(problem.steps, torch.float64), dtype)
    for expected, s in zip(problem.expected, sigma, strict=True):
        assert torch.equal(expected.allowed, 3 * criterion.per_channel(s) + torch.finfo(dtype).tiny)
    oracle.check(problem, "reference")


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_value
@torch.no_grad()
def test_where_a_value_goes_is_not_asked_of_stock(name, dtype, value):
    with lost_convolutions():
        check_value(sample(name, dtype), value, "reference")


@each_value
@torch.no_grad()
def test_where_a_value_goes_in_float32(value):
    for name in MAPS:
        check_value(sample(name), value, "reference")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_setting_comes_in_every_dtype(kind):
    """Where each case is dealt one; and every activation in every dtype where the cases are few."""
    cases = [case for case in hostile(kind) if case.n]
    cells = {(dtype, *item) for case in cases for dtype in DTYPES if fits(case, dtype) for item in vars(case).items()}
    met = {(dtype, *item) for case, dtype in dealt(cases) for item in vars(case).items()}
    assert len(cells - met) <= 2, "no case was left for them"
    few = [cell.values for cell in few_cells(cases) if not cell.marks]
    assert len(few) < len(cases) / 2
    assert {(dtype, case.act) for case, dtype in few} == {
        (dtype, value) for dtype, name, value in cells if name == "act"
    }


def test_one_element_of_stock_that_is_not_finite_takes_all_its_error():
    exact = torch.ones(2, 3, dtype=torch.float64)
    stock, sigma = exact.bfloat16() + 0.5, torch.full_like(exact, 1e-3)
    tiny = torch.finfo(torch.bfloat16).tiny
    assert torch.equal(criterion.tolerance(exact, stock, sigma, torch.bfloat16), 1 + 3 * sigma[0] + tiny)
    for value in (torch.nan, torch.inf, -torch.inf):
        stock[0, 1] = value
        assert torch.equal(criterion.tolerance(exact, stock, sigma, torch.bfloat16), 3 * sigma[0] + tiny)


def test_models_are_measured_without_convolutions_of_16_bits():
    """Nor does what is not finite in stock allow anything."""
    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(5, 7, 3, padding=1), torch.randn(1, 5, 8, 8)
    exact = conv.double()(x.double()).detach()
    conv.float()
    with lost_convolutions(), torch.no_grad():
        for module, given in ((copy.deepcopy(conv).bfloat16(), x.bfloat16()), (conv, x)):
            with torch.autocast("cpu", torch.bfloat16, enabled=module is conv):
                assert module(given).isnan().all()
                with criterion.measuring():
                    stock = module(given)
            assert stock.dtype == torch.bfloat16
            assert_as_accurate(stock, stock, exact)
            with pytest.raises(AssertionError, match="allowed"):
                assert_as_accurate(stock + 1, stock, exact)
            with pytest.raises(AssertionError, match="allowed"):
                assert_as_accurate(stock + 1, stock.fill_(torch.nan), exact)


def test_wrong_layouts_are_rejected():
    nchw = torch.zeros(2, 3, 4, 5)
    with pytest.raises(AssertionError, match="strides"):
        oracle.assert_layout("y", nchw, [])
    nhwc = nchw.contiguous(memory_format=torch.channels_last)
    with pytest.raises(AssertionError, match="aliases"):
        oracle.assert_layout("y", nhwc, [nhwc[:1]])
    oracle.assert_layout("y", nhwc, [nchw])
