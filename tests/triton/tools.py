"""Problems on the device that the Triton kernels run on in this session."""

import dataclasses
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.ops.inputs import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(tree: Any) -> Any:
    """Every tensor on ``DEVICE``, strides kept: what lies between the elements of a view comes along."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        flat = torch.empty(0, dtype=leaf.dtype).set_(leaf.untyped_storage()).to(DEVICE)
        return flat.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())

    return tree if DEVICE == "cpu" else tree_map(move, tree)


def native(problem: Problem) -> Problem:
    """The problem with its tensors on ``DEVICE`` for the call of the triton backend, results back on the CPU."""

    def call(*args: Any, backend: str, **kwargs: Any) -> Any:
        if backend != "triton":
            return problem.function(*args, **kwargs, backend=backend)
        return tree_map(torch.Tensor.cpu, problem.function(*on_device(args), **on_device(kwargs), backend=backend))

    return problem if DEVICE == "cpu" else dataclasses.replace(problem, function=call)
