"""What the tests of several CUDA kernels share."""

from types import ModuleType

import torch

from tests.ops import oracle
from tests.ops.cases import Case
from tests.ops.device import native
from tests.ops.inputs import build


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
