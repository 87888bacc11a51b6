"""Problems on the device that the CUDA kernels run on in this session."""

import dataclasses
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.ops.inputs import Problem
from tests.triton.tools import DEVICE, on_device

__all__ = ["DEVICE", "native", "on_device"]


def native(problem: Problem) -> Problem:
    """The problem with its tensors on ``DEVICE`` for the call of the cuda backend, results back on the CPU."""

    def call(*args: Any, backend: str, **kwargs: Any) -> Any:
        if backend != "cuda":
            return problem.function(*args, **kwargs, backend=backend)
        return tree_map(torch.Tensor.cpu, problem.function(*on_device(args), **on_device(kwargs), backend=backend))

    return problem if DEVICE == "cpu" else dataclasses.replace(problem, function=call)
