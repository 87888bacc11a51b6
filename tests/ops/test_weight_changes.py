"""A changed weight is used at once, however it was changed: no backend may serve a stale copy of it."""

import dataclasses

import pytest
import torch
from torch.utils._pytree import tree_map

from effnet_kernels import native
from effnet_kernels.functional import ConvBN
from tests.ops.inputs import SAMPLES, Problem, sample

each_sample = pytest.mark.parametrize("name", [name for name in SAMPLES if "squeeze" not in name])


def weights(problem: Problem) -> list[torch.Tensor]:
    """The convolution weights among the arguments."""
    nested = [arg.weight for arg in problem.args if isinstance(arg, ConvBN)]
    return nested or [problem.args[1]]


def assert_current(problem: Problem, backend: str) -> None:
    """The result is that of fresh copies of all arguments."""
    copies = dataclasses.replace(problem, args=_copied(problem.args)).call(backend)
    for a, b in zip(problem.call(backend), copies, strict=True):
        assert torch.equal(a, b)


def _copied(tree: tuple) -> tuple:
    return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, tree)


def halve_in_place(weight: torch.Tensor) -> None:
    weight.mul_(0.5)


def write_through_a_view(weight: torch.Tensor) -> None:
    weight[-1].neg_()


def write_past_the_version_counter(weight: torch.Tensor) -> None:
    weight.data.mul_(-2)


def write_one_element(weight: torch.Tensor) -> None:
    weight.data.view(-1)[weight.numel() // 2] += 1


def replace_the_storage(weight: torch.Tensor) -> None:
    weight.data = weight.data.flip(0).contiguous() + 1


def change_the_strides(weight: torch.Tensor) -> None:
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)


CHANGES = (
    halve_in_place,
    write_through_a_view,
    write_past_the_version_counter,
    write_one_element,
    replace_the_storage,
    change_the_strides,
)


@each_sample
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_changes(name, change, dtype, backend):
    problem = sample(name, dtype)
    problem.call(backend)
    for weight in weights(problem):
        change(weight)
        assert_current(problem, backend)


@each_sample
def test_inference_tensors_have_no_version(name, backend):
    with torch.inference_mode():
        problem = sample(name)
        problem.call(backend)
        for weight in weights(problem):
            weight.mul_(0.5)
            assert_current(problem, backend)


@each_sample
@torch.no_grad()
def test_a_weight_in_the_place_of_a_dead_one(name, backend):
    """Python gives a new tensor the id, and malloc the address, of one that has just died."""
    problem = sample(name)
    for i in range(20):
        args = tree_map(lambda t, i=i: t * (i + 1) if isinstance(t, torch.Tensor) else t, problem.args)
        assert_current(dataclasses.replace(problem, args=args), backend)


@each_sample
@torch.no_grad()
def test_another_instruction_set(name, backend):
    """Copies made for one instruction set are not read by another."""
    problem = sample(name)
    before = problem.call(backend)
    chosen = native.instruction_set()
    native.set_instruction_set("generic")
    problem.call(backend)
    native.set_instruction_set(chosen)
    assert all(torch.equal(a, b) for a, b in zip(problem.call(backend), before, strict=True))
