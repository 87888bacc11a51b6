"""``fused_mbconv`` on every backend against its float64 reference."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given

from effnet_kernels import functional
from tests.ops import oracle
from tests.ops.cases import DTYPES, EXAMPLES, Fused, drawn, fits, grid
from tests.ops.inputs import build, serves
from tests.ops.special_values import unit_bn


@pytest.mark.parametrize(("case", "dtype"), grid(Fused))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_grid(case, dtype, backend, problem):
    serves(backend, "fused_mbconv", dtype)
    oracle.check(problem(case, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
@EXAMPLES
@given(case=drawn(Fused))
@torch.no_grad()
def test_any_shape(case, dtype, backend):
    assume(fits(case, dtype))
    serves(backend, "fused_mbconv", dtype)
    oracle.check(build(case, dtype), backend)


# Large enough for Winograd's algorithm on a CPU; its tiles do not divide these maps.
DENSE = Fused(2, (9, 13), cin=26, mid=35, cout=26, residual=True)


def one_tap(weight: torch.Tensor, y: int, x: int) -> None:
    kept = weight[:, :, y, x].clone()
    weight.zero_()[:, :, y, x] = kept


def pruned(weight: torch.Tensor) -> None:
    weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.1)


def channels_apart(weight: torch.Tensor) -> None:
    """Every input channel counts a hundred times less than the one before, in cycles of three."""
    weight.mul_(100.0 ** -(torch.arange(weight.shape[1]) % 3)[:, None, None])


WEIGHTS: dict[str, Callable[[torch.Tensor], object]] = {
    "as drawn": lambda weight: None,
    "upper left tap": lambda weight: one_tap(weight, 0, 0),
    "middle tap": lambda weight: one_tap(weight, 1, 1),
    "lower row": lambda weight: weight[:, :, :2].zero_(),
    "pruned": pruned,
    "one pair pruned": lambda weight: one_tap(weight[3:4, 5:6], 0, 2),
    "channels apart": channels_apart,
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("place", [(0, 0), (0, -1), (-1, 0), (-1, -1), (0, 4), (3, 4), None], ids=str)
@torch.no_grad()
def test_large_pixels_spoil_no_others(weights, place, backend):
    """A pixel a million times as large as the others, wherever it is and whatever weights it meets."""
    problem = build(DENSE, torch.float32)
    WEIGHTS[weights](problem.args[1].weight)
    if place is not None:
        problem.x[:, 5, place[0], place[1]] *= 1e6
    oracle.check(problem, backend)


@torch.no_grad()
def test_sums_that_overflow_only_on_the_way(backend):
    """Pixels that are finite, and whose sum is not, in windows whose weights are small."""
    problem = build(DENSE, torch.float32)
    problem.args[1].weight.mul_(1e-6)
    problem.x[:, 3, 2:5, 2:5] = 2e38
    problem.x[:, 3, 7:, 5:8] = torch.tensor([3e38, -3e38, 3e38])
    oracle.check(problem, backend)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e35], ids=str)
@torch.no_grad()
def test_a_weight_that_is_out_of_range(value, backend):
    problem = build(DENSE, torch.float32)
    problem.args[1].weight[7, 2, 1, 2] = value
    x, weight = problem.x, problem.args[1].weight
    got = functional.fused_mbconv(x, functional.ConvBN(weight, unit_bn(35)), act="identity", backend=backend)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    others = torch.arange(35) != 7
    assert (got[:, others].double() - exact[:, others]).abs().max() < 1e-4
    assert torch.equal(got[:, 7].isfinite(), exact[:, 7].float().isfinite())


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("as drawn", True), ("channels apart", True), ("pruned", False), ("one pair pruned", False)],
)
@torch.no_grad()
def test_fewer_products_where_that_is_as_exact(weights, expected, cpu_backend):
    """Without padding by the call itself a window is always taken tap by tap: other bits tell that it was not."""
    problem = build(DENSE, torch.float32)
    weight = problem.args[1].weight
    WEIGHTS[weights](weight)
    conv = functional.ConvBN(weight, unit_bn(35))
    by_call = functional.fused_mbconv(problem.x, conv, act="identity", padding=1, backend=cpu_backend)
    padded = F.pad(problem.x, (1, 1, 1, 1))
    by_taps = functional.fused_mbconv(padded, conv, act="identity", padding=0, backend=cpu_backend)
    assert torch.equal(by_call, by_taps) is not expected
