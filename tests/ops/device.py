"""Problems where the kernels of Triton and CUDA run in this session: on a GPU, or on the CPU that stands for one."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from effnet_kernels.ops.common import Op
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


def for_backend(tree: Any, backend: str) -> Any:
    """Every tensor where the backend serves it."""
    return on_device(tree) if backend in ("mixed", "triton", "cuda") else tree


def native(problem: Problem) -> Problem:
    """The problem with copies of its tensors on ``DEVICE`` where a GPU's backend is called, results back on the CPU."""

    def call(*args: Any, backend: str, **kwargs: Any) -> Any:
        args, kwargs = for_backend((args, kwargs), backend)
        results = problem.function(*args, **kwargs, backend=backend)
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if is_memory(leaf)}
        for result in tree_leaves(results):
            assert not is_memory(result) or result.untyped_storage().data_ptr() not in inputs, "aliases an input"
        return tree_map(torch.Tensor.cpu, results)

    return dataclasses.replace(problem, function=call)


class Record(TorchDispatchMode):
    """Keeps the calls of native ops that write an output."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.namespace = f"effnet_kernels_{backend}"
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace and any(argument.is_write for argument in func._schema.arguments):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def native_call(problem: Problem, backend: str) -> tuple[torch._ops.OpOverload, tuple]:
    """The native op that a problem calls, and its arguments, outputs first; they have been computed."""
    with pytest.MonkeyPatch.context() as patch, Record(backend) as record:
        patch.setattr(Op, "__call__", Op.run)
        native(problem).call(backend)
    (call,) = record.calls
    return call


def opcheck(problem: Problem, backend: str) -> None:
    """torch's own checks of the op that a problem calls."""
    args, kwargs = for_backend((problem.args, problem.kwargs), backend)
    calls: list[tuple[Any, tuple]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "__call__", lambda op, *args: calls.append((op.overload, args)) or torch.zeros(()))
        problem.function(*args, **kwargs, backend=backend)
    ((overload, args),) = calls
    torch.library.opcheck(overload, args)


def is_memory(leaf: Any) -> bool:
    """Whether it is a tensor with elements."""
    return isinstance(leaf, torch.Tensor) and leaf.numel() > 0


def mark(items: list[pytest.Item], folder: str, missing: str | None) -> None:
    """Marks the tests of a folder: on a GPU ``-m gpu`` asks for them; skipped where something is missing."""
    for item in items:
        if folder not in item.path.as_posix():
            continue
        if DEVICE == "cuda":
            item.add_marker(pytest.mark.gpu)
        if missing is not None:
            item.add_marker(pytest.mark.skip(reason=missing))
