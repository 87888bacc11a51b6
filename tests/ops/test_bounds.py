"""The native kernels read and write nothing outside of their tensors, to the byte."""

import pytest
import torch

from tests.guarded import Copies, death, guarded
from tests.ops.cases import Case, Depthwise, Fused, MBConv, Pointwise, Squeeze, hostile
from tests.ops.inputs import build, sample

# Larger than one band of rows; and windows for Winograd's algorithm.
MORE: dict[type[Case], list[Case]] = {
    MBConv: [MBConv(1, (40, 39), cin=17, mid=65, cout=33, reduced=None)],
    Fused: [Fused(1, (16, 17), cin=25, mid=33, cout=17), Fused(1, (20, 13), cin=24, mid=24, cout=None)],
}
each_side = pytest.mark.parametrize("at_end", [False, True], ids=["front", "back"])


def assert_within(case: Case, dtype: torch.dtype, backend: str, at_end: bool) -> None:
    problem = build(case, dtype)
    expected = problem.call(backend)
    with Copies(lambda t, _: guarded(t, at_end)) as copies:
        got = problem.call(backend)
    assert len(copies.calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", [Pointwise, Depthwise, Squeeze, Fused, MBConv])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_side
@torch.inference_mode()
def test_grid(kind, dtype, at_end, cpu_backend):
    cases = [*hostile(kind), *MORE.get(kind, [])]
    jobs = ((str(case), lambda case=case: assert_within(case, dtype, cpu_backend, at_end)) for case in cases)
    assert death(jobs) is None


@pytest.mark.parametrize("name", ["pointwise_conv_bn_act", "squeeze_excite", "mbconv"])
@each_side
@torch.inference_mode()
def test_a_tensor_that_is_one_element_short_is_noticed(name, at_end, cpu_backend):
    """And so is a kernel that takes one element too many: it is the same access."""
    problem = sample(name)
    with Copies(lambda t, _: t) as copies:
        problem.call(cpu_backend)
    for number, argument in enumerate(copies.calls[0]):
        with Copies(lambda t, i, n=number: guarded(t, at_end, short=i == n), write_back=False):
            assert death([("call", lambda: problem.call(cpu_backend))]) == "SIGSEGV in call", f"{number}: {argument}"
