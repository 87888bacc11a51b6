"""Squeeze-and-excitation in CUDA against the float64 reference, by the criterion of docs/numerics.md."""

import pytest
import torch

from effnet_kernels import functional as F
from tests.ops import oracle
from tests.ops.cases import DTYPES, Squeeze, SqueezeGate, cells
from tests.ops.device import native, on_device
from tests.ops.inputs import build
from tests.ops.special_values import check_squeeze_in_float16, check_value, each_value

pytestmark = pytest.mark.usefixtures("poison")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Several tiles of pixels; several blocks of channels; more channels than threads; more hidden units than warps.
TILED = [
    Squeeze(2, (17, 31), c=136, reduced=6),
    Squeeze(1, (40, 30), c=8, reduced=2),
    Squeeze(1, (3, 3), c=700, reduced=150),
    Squeeze(2, (20, 20), c=37, reduced=9),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduced", [4, 10, 7])
@torch.no_grad()
def test_bits_of_a_gate_do_not_depend_on_addresses(reduced, dtype):
    problem = native(build(SqueezeGate(c=480, reduced=reduced), torch.float32))
    mean, se = problem.args

    def call(offset: int) -> torch.Tensor:
        weights = [se.w_reduce.to(dtype), se.w_expand.to(dtype)]
        moved = [w.new_empty(offset + w.numel())[offset:].view_as(w).copy_(w) for w in weights]
        layers = se._replace(w_reduce=moved[0], w_expand=moved[1])
        return F.squeeze_excite_gate(mean, layers, backend="cuda")

    expected = call(0)
    for offset in (1, 2, 4):
        assert torch.equal(call(offset), expected)


@pytest.mark.parametrize(("case", "dtype"), cells(TILED))
@torch.no_grad()
def test_many_blocks(case, dtype, schedule):
    oracle.check(native(build(case, dtype)), "cuda")


@pytest.mark.parametrize("case", [Squeeze(70, (5, 5), c=48, reduced=3), Squeeze(3, (19, 20), c=70)], ids=str)
@each_dtype
@torch.no_grad()
def test_same_bits(case, dtype):
    """On every run, for every batch size, which decides how many blocks share a gate, and wherever the map begins."""
    problem = native(build(case, dtype))
    (y,) = problem.call("cuda")
    (again,) = problem.call("cuda")
    assert torch.equal(again, y)
    x = problem.x
    (one,) = (F.squeeze_excite(*on_device((x[1:2], *problem.args[1:])), **problem.kwargs, backend="cuda").cpu(),)
    assert torch.equal(one[0], y[1])
    buffer = torch.empty(x.numel() + 1, dtype=dtype)
    shifted = buffer[1:].as_strided(x.shape, x.stride()).copy_(x)
    moved = F.squeeze_excite(*on_device((shifted, *problem.args[1:])), **problem.kwargs, backend="cuda")
    assert torch.equal(moved.cpu(), y)


@each_value
@torch.no_grad()
def test_a_value_that_is_not_finite_goes_where_stock_lets_it_go(value):
    check_value(native(build(Squeeze(2, (5, 5), c=19), torch.float32)), value, "cuda")


@torch.no_grad()
def test_means_do_not_overflow_in_float16():
    check_squeeze_in_float16("cuda")
