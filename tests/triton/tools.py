"""Problems on the device that the kernels for GPUs run on in this session."""

import dataclasses
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from tests.ops.inputs import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(tree: Any) -> Any:
    """A copy of every tensor on ``DEVICE``, strides kept: what lies between the elements of a view comes along.

    Copies on the CPU too, so that the way to a GPU is tested without one.
    """

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        flat = torch.empty(0, dtype=leaf.dtype).set_(leaf.untyped_storage()).to(DEVICE, copy=True)
        moved = flat.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
        return moved.requires_grad_(leaf.requires_grad)

    return tree_map(move, tree)


def native(problem: Problem) -> Problem:
    """The problem with copies of its tensors on ``DEVICE`` where a GPU's backend is called, results back on the CPU."""

    def call(*args: Any, backend: str, **kwargs: Any) -> Any:
        if backend not in ("triton", "cuda"):
            return problem.function(*args, **kwargs, backend=backend)
        args, kwargs = on_device((args, kwargs))
        results = problem.function(*args, **kwargs, backend=backend)
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if is_memory(leaf)}
        for result in tree_leaves(results):
            assert not is_memory(result) or result.untyped_storage().data_ptr() not in inputs, "aliases an input"
        return tree_map(torch.Tensor.cpu, results)

    return dataclasses.replace(problem, function=call)


def is_memory(leaf: Any) -> bool:
    """Whether it is a tensor with elements."""
    return isinstance(leaf, torch.Tensor) and leaf.numel() > 0
