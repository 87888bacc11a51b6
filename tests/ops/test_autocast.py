"""Under autocast an op casts what the stock convolution would cast, and keeps BatchNorm and SE in float32."""

import dataclasses

import pytest
import torch
from torch.utils._pytree import tree_map

from tests.ops import oracle
from tests.ops.inputs import SAMPLES, Problem, sample

MAPS = [name for name in SAMPLES if "gate" not in name]
each_map_op = pytest.mark.parametrize("name", MAPS)


def cast_by_hand(problem: Problem) -> Problem:
    """Maps and convolution weights in bfloat16; vectors and SE as they are."""
    se = {id(t) for arg in problem.args if type(arg).__name__ == "SqueezeExciteWeights" for t in arg[:4]}

    def half(leaf: object) -> object:
        is_map = isinstance(leaf, torch.Tensor) and leaf.dim() == 4 and id(leaf) not in se
        return leaf.bfloat16() if is_map else leaf

    return dataclasses.replace(
        problem, args=tree_map(half, problem.args), kwargs=tree_map(half, problem.kwargs), steps=[]
    )


@each_map_op
@torch.no_grad()
def test_casts_maps_and_convolution_weights_only(name, backend_name):
    problem = sample(name)
    by_hand = cast_by_hand(problem).call(backend_name)
    with torch.autocast("cpu", torch.bfloat16):
        got = problem.call(backend_name)
    for a, b in zip(got, by_hand, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@each_map_op
@torch.no_grad()
def test_dtype_is_that_of_stock_layers(name, backend_name):
    """Maps arrive in bfloat16, as they do behind a network's first convolution."""
    problem = sample(name)
    with torch.autocast("cpu", torch.bfloat16):
        stock = oracle.stock(problem.x.bfloat16(), problem.steps[:1])
        got = dataclasses.replace(problem, args=(problem.x.bfloat16(), *problem.args[1:])).call(backend_name)
    assert got[0].dtype == stock[0].dtype == torch.bfloat16


@torch.no_grad()
def test_the_gate_stays_in_float32(backend_name):
    problem = sample("squeeze_excite_gate")
    (expected,) = problem.call(backend_name)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = problem.call(backend_name)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", SAMPLES)
@torch.no_grad()
def test_float64_is_left_alone(name):
    problem = sample(name)
    expected = problem.call("auto", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = problem.call("auto", torch.float64)
    assert all(torch.equal(a, b) and a.dtype == torch.float64 for a, b in zip(got, expected, strict=True))


def test_gradients_return_to_the_dtype_of_the_parameters(backend_name):
    problem = sample("mbconv")
    weight = problem.args[4].weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = problem.call(backend_name)
        y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert torch.isfinite(weight.grad).all()
