"""Dense windows on maps that are large enough for Winograd's algorithm: where it is taken, and how exact it is."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from effnet_kernels import functional
from tests.ops import oracle
from tests.ops.cases import Fused, cells
from tests.ops.inputs import build
from tests.ops.special_values import unit_bn

# Large enough for Winograd's algorithm on a CPU; its tiles do not divide these maps.
DENSE = Fused(2, (17, 19), cin=26, mid=35, cout=26, residual=True)
LARGE = [
    DENSE,
    dataclasses.replace(DENSE, layout="nchw", act="hardswish", params="strided"),
    dataclasses.replace(DENSE, layout="sliced", act="relu6", values="large", cout=None, residual=False),
    Fused(1, (16, 16), cin=24, mid=24, cout=None, residual=True),
    Fused(3, (1, 300), cin=31, mid=41, cout=7, values="saturated"),
    Fused(1, (300, 1), cin=24, mid=33, cout=None, layout="transposed", act="relu"),
    Fused(2, (2, 129), cin=70, mid=49, cout=24, layout="expanded", values="tiny_var"),
    Fused(1, (23, 21), cin=25, mid=64, cout=None, padding="none", bn16=True),
    Fused(1, (21, 22), cin=40, mid=29, cout=12, padding="large"),
    Fused(2, (17, 18), cin=33, mid=65, cout=None, padding=(1, 2, 3, 1), act="identity"),
    Fused(0, (17, 18), cin=33, mid=65, cout=17),
]


@pytest.mark.parametrize(("case", "dtype"), cells(LARGE))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_large_maps(case, dtype, backend):
    oracle.check(build(case, dtype), backend)


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
    "a corner of one channel": lambda weight: weight[:, 5, :2, :2].mul_(1e-3),
    "channels apart": channels_apart,
    "tiny": lambda weight: weight.mul_(1e-40),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("place", [(0, 0), (-1, -1), (0, 4), (6, 5)], ids=str)
@pytest.mark.parametrize(("act", "pixel"), [("identity", 1e6), ("silu", 1e4), ("relu6", 300.0), ("relu6", 30.0)])
@torch.no_grad()
def test_a_large_pixel_spoils_no_others(weights, place, act, pixel, backend):
    """Wherever it is and whatever weights it meets, and where its own outputs are cut off by the activation."""
    problem = build(dataclasses.replace(DENSE, act=act, cout=None, residual=False), torch.float32)
    WEIGHTS[weights](problem.args[1].weight)
    problem.x[:, 5, place[0], place[1]] = pixel
    oracle.check(problem, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["silu", "relu", "relu6", "hardswish"])
@torch.no_grad()
def test_a_large_pixel_that_is_cut_off(act, dtype, backend):
    """Its only weight has the sign that the activation makes nothing of: no output is as large as it is."""
    problem = build(dataclasses.replace(DENSE, act=act, cout=None, residual=False), dtype)
    weight, bn = problem.args[1].weight, problem.args[1].bn
    middle = -(weight[:, 5, 1, 1].abs() + 0.01) * bn.gamma.sign()
    weight[:, 5] = 0
    weight[:, 5, 1, 1] = middle
    problem.x[:, 5, 4, 4] = 1e6
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
    x, weight = problem.x, problem.args[1].weight
    weight[7, 2, 1, 2] = value
    got = functional.fused_mbconv(x, functional.ConvBN(weight, unit_bn(35)), act="identity", backend=backend)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    others = torch.arange(35) != 7
    assert (got[:, others].double() - exact[:, others]).abs().max() < 1e-4
    assert torch.equal(got[:, 7].isfinite(), exact[:, 7].float().isfinite())


def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    conv = functional.ConvBN(weight, unit_bn(weight.shape[0]))
    return functional.fused_mbconv(x, conv, act="identity", padding=1, backend="cpu")


def by_taps(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The upper left of it, which a small map has by itself, too small for anything else."""
    return convolve(x[..., :12, :12].contiguous(), weight)[..., :11, :11]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("as drawn", True),
        ("channels apart", True),
        ("middle tap", True),
        ("a corner of one channel", True),
        ("upper left tap", False),
        ("tiny", False),
    ],
)
@pytest.mark.usefixtures("backend")
@torch.no_grad()
def test_where_there_are_fewer_products(weights, expected):
    """Other bits tell that it was not tap by tap."""
    x, weight = (t.clone() for t in (build(DENSE, torch.float32).x, build(DENSE, torch.float32).args[1].weight))
    WEIGHTS[weights](weight)
    assert torch.equal(convolve(x, weight)[..., :11, :11], by_taps(x, weight)) is not expected


@pytest.mark.usefixtures("backend")
@torch.no_grad()
def test_outputs_that_see_a_large_pixel_go_tap_by_tap():
    problem = build(DENSE, torch.float32)
    x, weight = problem.x.clone(), problem.args[1].weight
    before = convolve(x, weight)
    x[:, 5, 4, 6] = 1e3
    after, taps = convolve(x, weight), by_taps(x, weight)
    sees = torch.zeros(17, 19, dtype=torch.bool)
    sees[3:6, 5:8] = True
    assert torch.equal(after[..., sees], taps[..., sees[:11, :11]])
    assert torch.equal(after[..., ~sees], before[..., ~sees])


@pytest.mark.parametrize("channels", [24, 48, 64])
@pytest.mark.parametrize("pixels", [lambda x: x, F.silu, lambda x: x + 3], ids=["normal", "silu", "of one sign"])
@pytest.mark.usefixtures("backend")
@torch.no_grad()
def test_fewer_products_are_no_less_exact(channels, pixels):
    generator = torch.Generator().manual_seed(0)
    x = pixels(torch.randn(20, channels, 17, 17, generator=generator))
    weight = torch.randn(48, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    exact = F.conv2d(x.double(), weight.double(), padding=1)[..., :11, :11]

    def error(y: torch.Tensor) -> float:
        return (y.double() - exact).square().mean().sqrt().item()

    assert 0 < error(convolve(x, weight)[..., :11, :11]) < 0.8 * error(by_taps(x, weight))
