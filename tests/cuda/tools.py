"""What the tests of several CUDA kernels share."""

from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effnet_kernels.ops.common import Op
from tests.ops import oracle
from tests.ops.cases import Case
from tests.ops.device import native
from tests.ops.inputs import Problem, build


def check(case: Case, dtype: torch.dtype, emulation: ModuleType | None, seeds: int = 2) -> None:
    """The case against its float64 reference; runs with other orders of threads give the same bits."""
    problem = native(build(case, dtype))
    if emulation is not None:
        emulation.set_seed(0)
    first = oracle.check(problem, "cuda")
    for seed in range(1, seeds):
        if emulation is not None:
            emulation.set_seed(seed)
        for got, again in zip(first, problem.call("cuda"), strict=True):
            assert torch.equal(got, again), "two runs differ"


class Record(TorchDispatchMode):
    """Keeps the arguments of native ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "effnet_kernels_cuda":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def native_call(problem: Problem) -> tuple[torch._ops.OpOverload, tuple]:
    """The native op that a problem calls, and its arguments, outputs first; they have been computed."""
    with pytest.MonkeyPatch.context() as patch, Record() as record:
        patch.setattr(Op, "__call__", Op.run)
        native(problem).call("cuda")
    (call,) = record.calls
    return call
