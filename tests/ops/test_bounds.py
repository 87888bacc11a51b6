"""The native kernels read and write nothing outside of their tensors, to the byte."""

import itertools

import pytest
import torch

from tests.guarded import Copies, death, guarded
from tests.ops.cases import DTYPES, KINDS, Case, Fused, MBConv, dealt, hostile
from tests.ops.inputs import build, sample
from tests.thinning import daily, in_turns

# Larger than one band of rows; and windows for Winograd's algorithm.
MORE: dict[type[Case], list[Case]] = {
    MBConv: [MBConv(1, (40, 39), cin=17, mid=65, cout=33, reduced=None)],
    Fused: [Fused(1, (16, 17), cin=25, mid=33, cout=17), Fused(1, (20, 13), cin=24, mid=24, cout=None)],
}


def assert_within(case: Case, dtype: torch.dtype, backend: str, at_end: bool) -> None:
    problem = build(case, dtype)
    expected = problem.call(backend)
    with Copies(lambda t, _: guarded(t, at_end)) as copies:
        got = problem.call(backend)
    assert len(copies.calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", daily(["dealt", "all"], ["dealt"]))
@torch.inference_mode()
def test_grid(kind, dtypes, backend):
    cases = [*hostile(kind), *MORE.get(kind, [])]
    jobs = dealt(cases) if dtypes == "dealt" else itertools.product(cases, DTYPES)
    every = itertools.product(jobs, (False, True))
    assert death((f"{job}", lambda job=job: assert_within(*job[0], backend, job[1])) for job in every) is None


@in_turns("name, at_end", ["pointwise_conv_bn_act", "squeeze_excite", "mbconv"], [False, True])
@torch.inference_mode()
def test_a_tensor_that_is_one_element_short_is_noticed(name, at_end, backend):
    """And so is a kernel that takes one element too many: it is the same access."""
    problem = sample(name)
    with Copies(lambda t, _: t) as copies:
        problem.call(backend)
    for number, argument in enumerate(copies.calls[0]):
        with Copies(lambda t, i, n=number: guarded(t, at_end, short=i == n), write_back=False):
            assert death([("call", lambda: problem.call(backend))]) == "SIGSEGV in call", f"{number}: {argument}"
