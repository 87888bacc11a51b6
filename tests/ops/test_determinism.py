"""The same bits on every run; on the CPU also for every thread count, batch size and calling thread."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.ops.cases import Case, Depthwise, Fused, MBConv, Pointwise, Squeeze
from tests.ops.inputs import Problem, build

# Large enough for every kernel to split its work over threads.
CASES: dict[str, Case] = {
    "pointwise_conv_bn_act": Pointwise(3, (28, 28), cin=96, cout=80, gate=True, residual="nhwc"),
    "pointwise_conv_bn_act-pool": Pointwise(3, (14, 14), cin=96, cout=320, pool=True),
    "depthwise_conv_bn_act": Depthwise(3, (56, 55), c=97, kernel=(5, 5)),
    "squeeze_excite": Squeeze(3, (28, 28), c=240, reduced=10),
    "fused_mbconv": Fused(3, (56, 56), cin=24, mid=96, cout=24, residual=True),
    "fused_mbconv-odd": Fused(3, (37, 51), cin=32, mid=48, cout=None),
    "fused_mbconv-stem": Fused(3, (112, 112), cin=3, mid=32, cout=None, stride=(2, 2), padding="tf"),
    "mbconv": MBConv(3, (28, 28), cin=40, mid=240, cout=40, kernel=(5, 5), reduced=10, residual=True),
    "mbconv-bands": MBConv(3, (56, 55), cin=24, mid=144, cout=24, kernel=(5, 5), reduced=None, residual=True),
    "mbconv-separable": MBConv(3, (56, 56), cin=32, mid=None, cout=16, reduced=8),
}

each_case = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def large(name: str, dtype: torch.dtype, backend: str, **changes: int) -> Problem:
    return build(dataclasses.replace(CASES[name], **changes), dtype)


def assert_same_bits(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} elements differ"


@each_case
@each_dtype
@torch.inference_mode()
def test_two_runs(name, dtype, backend):
    problem = large(name, dtype, backend)
    assert_same_bits(problem.call(backend), problem.call(backend))


@each_case
@each_dtype
@pytest.mark.parametrize("n", [1, 3])
@torch.inference_mode()
def test_thread_counts(name, dtype, n, backend):
    problem = large(name, dtype, backend, n=n)
    expected = problem.call(backend)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(problem.call(backend), expected)


@each_case
@each_dtype
@torch.inference_mode()
def test_an_image_does_not_depend_on_its_batch(name, dtype, backend):
    problem = large(name, dtype, backend)
    batch = problem.call(backend)
    per_image = [key for key in ("gate", "residual") if isinstance(problem.kwargs.get(key), torch.Tensor)]
    for i in range(3):
        args = (problem.x[i : i + 1], *problem.args[1:])
        kwargs = problem.kwargs | {key: problem.kwargs[key][i : i + 1] for key in per_image}
        alone = dataclasses.replace(problem, args=args, kwargs=kwargs).call(backend)
        assert_same_bits(alone, tuple(y[i : i + 1] for y in batch))


@each_case
def test_two_calling_threads(name, backend):
    problem = large(name, torch.float32, backend)
    other = large(name, torch.float32, backend, n=2)
    torch.set_num_threads(2)

    @torch.inference_mode()  # the mode belongs to a thread
    def call(which: Problem) -> tuple[torch.Tensor, ...]:
        return which.call(backend)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(call, [problem, other] * 3))
    for result, which in zip(results, [problem, other] * 3, strict=True):
        assert_same_bits(result, call(which))
