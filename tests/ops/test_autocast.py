"""Under autocast an op casts what the stock convolution would cast, and keeps BatchNorm and SE in float32."""

import dataclasses

import pytest
import torch
from torch.utils._pytree import tree_map

from tests.ops import oracle
from tests.ops.inputs import SAMPLES, Problem, sample

MAPS = [name for name in SAMPLES if "gate" not in name]
each_map_op = pytest.mark.parametrize("name", MAPS)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def cast_by_hand(problem: Problem, dtype: torch.dtype) -> Problem:
    """Maps and convolution weights in ``dtype``; vectors and SE as they are."""
    se = {id(t) for arg in problem.args if type(arg).__name__ == "SqueezeExciteWeights" for t in arg[:4]}

    def half(leaf: object) -> object:
        is_map = isinstance(leaf, torch.Tensor) and leaf.dim() == 4 and id(leaf) not in se
        return leaf.to(dtype) if is_map else leaf

    return dataclasses.replace(
        problem, args=tree_map(half, problem.args), kwargs=tree_map(half, problem.kwargs), steps=[]
    )


@each_map_op
@each_dtype
@torch.no_grad()
def test_casts_maps_and_convolution_weights_only(name, dtype, backend_name):
    problem = sample(name)
    by_hand = cast_by_hand(problem, dtype).call(backend_name)
    with torch.autocast("cpu", dtype):
        got = problem.call(backend_name)
    for a, b in zip(got, by_hand, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@each_map_op
@each_dtype
@torch.no_grad()
def test_dtype_is_that_of_stock_layers(name, dtype, backend_name):
    """Maps arrive in 16 bits, as they do behind a network's first convolution."""
    problem = sample(name)
    with torch.autocast("cpu", dtype):
        stock = oracle.stock(problem.x.to(dtype), problem.steps[:1])
        got = dataclasses.replace(problem, args=(problem.x.to(dtype), *problem.args[1:])).call(backend_name)
    assert got[0].dtype == stock[0].dtype == dtype


@each_dtype
@torch.no_grad()
def test_the_gate_stays_in_float32(dtype, backend_name):
    problem = sample("squeeze_excite_gate")
    (expected,) = problem.call(backend_name)
    with torch.autocast("cpu", dtype):
        (got,) = problem.call(backend_name)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", SAMPLES)
@each_dtype
@torch.no_grad()
def test_float64_is_left_alone(name, dtype):
    problem = sample(name)
    expected = problem.call("auto", torch.float64)
    with torch.autocast("cpu", dtype):
        got = problem.call("auto", torch.float64)
    assert all(torch.equal(a, b) and a.dtype == torch.float64 for a, b in zip(got, expected, strict=True))


@each_dtype
def test_gradients_return_to_the_dtype_of_the_parameters(dtype, backend_name):
    problem = sample("mbconv")
    weight = problem.args[4].weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        (y,) = problem.call(backend_name)
        y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert torch.isfinite(weight.grad).all()
