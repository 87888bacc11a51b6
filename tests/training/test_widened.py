"""Products of bfloat16 in float32: every strip is there once, and sums are rounded once."""

import pytest
import torch
from torch import Tensor

from effnet_kernels import native
from effnet_kernels.ops import train_reference as reference
from effnet_kernels.ops import train_widened as widened
from effnet_kernels.ops.common import to_nhwc
from effnet_kernels.ops.train_block import Gradient, Layer, Norm, Through
from tests.training.blocks import CASES, assert_as_accurate, build, cells


@pytest.fixture(params=["one at a time", "a few", "all at once"])
def strip(request, monkeypatch):
    monkeypatch.setattr(widened, "STRIP", {"one at a time": 1, "a few": 1000, "all at once": 1 << 30}[request.param])


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def assert_rounded_once(got: Tensor, exact: Tensor, sizes: Tensor) -> None:
    """Half a unit in the last of 8 bits, and the rounding of a float32 sum of terms of these ``sizes``."""
    assert (got.dtype, got.shape) == (torch.bfloat16, exact.shape)
    assert ((got.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-20 * sizes).all()


@pytest.mark.usefixtures("strip")
def test_matrix_products():
    a, b, c = random(77, 19), random(19, 23), random(77, 23)
    out = torch.empty(77, 23, dtype=torch.bfloat16)
    widened.multiply(a, b, out)
    assert_rounded_once(out, a.double() @ b.double(), a.double().abs() @ b.double().abs())
    over_rows = widened.multiply_over_rows(a, c)
    assert_rounded_once(over_rows, a.double().t() @ c.double(), a.double().t().abs() @ c.double().abs())


@pytest.mark.parametrize(("stride", "padding"), [((1, 1), (1, 1, 1, 1)), ((2, 1), (0, 1, 1, 2))], ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "input", "weight"])
@pytest.mark.usefixtures("strip")
def test_convolutions(stride, padding, wanted):
    below, weight = wanted
    ones, no = torch.ones(6), torch.zeros(6)
    layer = Layer(random(6, 5, 3, 3), ones, no, no, ones, 1e-3, False, "identity", stride, padding)
    a = to_nhwc(random(5, 5, 9, 8))
    dy = to_nhwc(random(*layer.output_size(a.shape)))
    gradient = Gradient(dy, None, Norm(torch.zeros(4, 6), "identity"), "identity")
    through = Through(gradient, torch.zeros(3, 6), None, layer, tuple(a.shape), below, weight)

    def both(convert, products) -> list[Tensor]:
        exact_layer = layer._replace(weight=convert(layer.weight))
        exact = through._replace(layer=exact_layer)
        back = products.convolve_backward(convert(dy), convert(a) if weight else None, exact)
        assert (back.into is not None, back.weight is not None) == wanted
        forward = products.convolve(convert(a), exact_layer)
        return [forward, *(grad for grad in (back.into, back.weight) if grad is not None)]

    got = both(lambda x: x, widened)
    exact = both(lambda x: x.double(), reference)
    sizes = both(lambda x: x.double().abs(), reference)
    for each in zip(got, exact, sizes, strict=True):
        assert_rounded_once(*each)


@pytest.mark.parametrize("wide", [False, True], ids=["torch's own", "widened"])
@pytest.mark.parametrize(
    ("case", "dtype"), cells([case for case in CASES if set(case.kinds) & {"p", "f"}], [torch.bfloat16])
)
@pytest.mark.skipif(not native.cpu_available()[0], reason="the CPU library is not built")
def test_blocks_on_a_processor_with_and_without_instructions(case, dtype, wide, monkeypatch):
    monkeypatch.setattr(widened, "pays", lambda x: wide)
    assert_as_accurate(build(case, dtype), dtype, "cpu")


def test_no_rows():
    a, b = random(0, 3), random(3, 4)
    widened.multiply(a, b, random(0, 4))
    assert not widened.multiply_over_rows(a, random(0, 4)).any()


def test_where_it_pays(monkeypatch):
    x = torch.empty(2, dtype=torch.bfloat16)
    for has in (False, True):
        monkeypatch.setattr(widened, "_has_instructions", lambda has=has: has)
        assert widened.pays(x) is not has
        assert not widened.pays(x.float())
        assert not widened.pays(x.to("meta"))
