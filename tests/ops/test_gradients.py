"""Gradients against autograd through stock layers, in float64."""

import dataclasses

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from tests.models import BACKENDS
from tests.ops import oracle
from tests.ops.inputs import SAMPLES, Problem, sample, sample_cells

# Both sides are right to about 2^-53 times the number of terms, at most 1e-12; a wrong term shows at once.
RTOL = 1e-9


def fresh(problem: Problem, dtype: torch.dtype) -> tuple[Problem, list[torch.Tensor]]:
    """The problem in ``dtype`` with leaves of its own, all but running statistics requiring gradients."""
    statistics = {id(t) for step in problem.steps if isinstance(step, oracle.Conv) for t in step.bn[2:4]}
    leaves: dict[int, torch.Tensor] = {}

    def leaf(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in leaves:
            leaves[id(value)] = value.detach().to(dtype, copy=True).requires_grad_(id(value) not in statistics)
        return leaves[id(value)]

    args, kwargs, steps = tree_map(leaf, (problem.args, problem.kwargs, problem.steps))
    changed = dataclasses.replace(problem, args=args, kwargs=kwargs, steps=steps)
    return changed, [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad]


def gradients(outputs: list[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    return list(torch.autograd.grad(outputs, leaves, weights))


@pytest.mark.parametrize("name", SAMPLES)
def test_against_stock_layers(name):
    problem, leaves = fresh(sample(name), torch.float64)
    expected = gradients(oracle.stock(problem.x, problem.steps), leaves)
    got = gradients(list(problem.call("auto")), leaves)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= RTOL * b.abs().max()


@sample_cells
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_backend_has_the_gradients_of_the_reference(name, dtype, backend):
    problem, leaves = fresh(sample(name, dtype), dtype)
    got = gradients(list(problem.call(backend)), leaves)
    expected = gradients(list(problem.call("reference")), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_output_used_and_one_parameter_trained(backend_name):
    """The map alone, without the means, and gamma alone: what is not asked for is not computed."""
    problem = sample("depthwise_conv_bn_act")
    gamma = problem.args[2].gamma.requires_grad_()
    y, _ = problem.call(backend_name)
    y.sum().backward()
    assert gamma.grad is not None
    assert problem.x.grad is None


def test_gradients_have_the_dtype_of_their_parameters(backend_name):
    problem = sample("mbconv", torch.bfloat16)
    weight, gamma = problem.args[4].weight.requires_grad_(), problem.args[4].bn.gamma.requires_grad_()
    (y,) = problem.call(backend_name)
    y.float().sum().backward()
    assert (weight.grad.dtype, gamma.grad.dtype) == (torch.bfloat16, torch.float32)
