"""The ops as torch.library ops: opcheck, fake tensors, torch.compile, torch.export, and every mode alike.

What is slow, opcheck and the compilers, runs on the backend that this machine chooses: the wrapper is the same for all.
"""

import dataclasses

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

from tests.ops.device import opcheck
from tests.ops.inputs import SAMPLES, Problem, each_op, sample, sample_cells

each_sample = pytest.mark.parametrize("name", SAMPLES)


def same_bits(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def with_gradients(problem: Problem) -> Problem:
    """Everything that may receive a gradient asks for one: running statistics may not."""
    running = {id(t) for bn in _batch_norms(problem.args) for t in bn[2:4]}

    def ask(leaf: object) -> object:
        is_parameter = isinstance(leaf, torch.Tensor) and id(leaf) not in running
        return leaf.detach().clone().requires_grad_() if is_parameter else leaf

    return dataclasses.replace(problem, args=tree_map(ask, problem.args), kwargs=tree_map(ask, problem.kwargs))


def _batch_norms(tree: object) -> list[tuple[torch.Tensor, ...]]:
    if type(tree).__name__ == "BatchNorm":
        return [tree]  # type: ignore[list-item]
    return [bn for item in tree for bn in _batch_norms(item)] if isinstance(tree, tuple) else []


@each_op
def test_opcheck(name):
    opcheck(with_gradients(sample(name)), "auto")


@sample_cells
def test_fake_tensors_have_the_metadata_of_real_ones(name, dtype, backend_name):
    problem = sample(name, dtype)
    with FakeTensorMode() as mode:
        fake_args, fake_kwargs = tree_map(
            lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf,
            (problem.args, problem.kwargs),
        )
        fakes = dataclasses.replace(problem, args=fake_args, kwargs=fake_kwargs).call(backend_name)
    for fake, real in zip(fakes, problem.call(backend_name), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@each_sample
def test_every_mode_gives_the_same_bits(name, backend_name):
    problem = sample(name)
    in_grad_mode = problem.call(backend_name)
    with torch.no_grad():
        assert same_bits(problem.call(backend_name), in_grad_mode)
    with torch.inference_mode():
        assert same_bits(problem.call(backend_name), in_grad_mode)
    tracked = with_gradients(problem).call(backend_name)
    assert all(y.requires_grad for y in tracked)
    assert same_bits(tracked, in_grad_mode)


@each_sample
@torch.no_grad()
def test_compile_with_dynamic_shapes(name):
    torch.compiler.reset()
    problem = sample(name)
    frames = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        frames.append(graph)
        return graph

    compiled = torch.compile(problem.function, backend=count, fullgraph=True, dynamic=True)
    for n in (2, 3, 5):
        resized = sample(name, n=n, hw=(n + 4, 9 - n))
        assert same_bits(dataclasses.replace(resized, function=compiled).call("auto"), resized.call("auto"))
    assert len(frames) == 1, "recompiled for another shape"


@torch.no_grad()
def test_inductor_keeps_values_and_strides():
    """Neighbours that inductor fuses and lays out as it likes must not change what the op sees or gives."""
    torch.compiler.reset()
    problem = sample("mbconv")

    def neighbours(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return problem.function(x + 1, *args, **kwargs) * 2

    wrapped = dataclasses.replace(problem, function=neighbours)
    compiled = dataclasses.replace(problem, function=torch.compile(neighbours, fullgraph=True))
    (got,), (expected,) = compiled.call("auto"), wrapped.call("auto")
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()


@each_sample
@torch.no_grad()
def test_export(name):
    problem = sample(name)
    per_image = [key for key in ("gate", "residual") if isinstance(problem.kwargs.get(key), torch.Tensor)]

    class Block(torch.nn.Module):
        def forward(self, *batched: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x, *rest = batched
            kwargs = problem.kwargs | dict(zip(per_image, rest, strict=True))
            args = (x, *problem.args[1:])
            return dataclasses.replace(problem, args=args, kwargs=kwargs).call("auto")

    inputs = (problem.x, *(problem.kwargs[key] for key in per_image))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Block(), inputs, dynamic_shapes={"batched": tuple({0: batch} for _ in inputs)})
    larger = tuple(torch.cat([t, t, t]) for t in inputs)
    assert same_bits(program.module()(*larger), Block()(*larger))
