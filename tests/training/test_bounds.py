"""The native kernels of training read and write nothing outside of their tensors, to the byte."""

import pytest
import torch

from tests.guarded import Copies, death, guarded
from tests.training.blocks import CASES, Case, build


def assert_within(case: Case, dtype: torch.dtype, backend: str, at_end: bool) -> None:
    problem = build(case, dtype).to(dtype, torch.float32)
    expected = problem.run(backend)
    with Copies(lambda t, _: guarded(t, at_end)) as copies:
        got = problem.run(backend)
    assert copies.calls
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at_end", [False, True], ids=["front", "back"])
def test_bounds(dtype, at_end, backend):
    if backend != "cpu":
        pytest.skip("a promise of the native CPU backend")
    jobs = ((str(case), lambda case=case: assert_within(case, dtype, backend, at_end)) for case in CASES)
    assert death(jobs) is None
