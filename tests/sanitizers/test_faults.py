"""The sanitizers report what they are there for: planted faults, and kernels called on tensors that are too short."""

import ctypes
import math
import re

import pytest
import torch

from tests.emulation.build import asan_is_loaded
from tests.guarded import Copies, death
from tests.ops.conftest import backend, one_thread
from tests.ops.inputs import sample

__all__ = ["backend", "one_thread"]

pytestmark = pytest.mark.skipif(not asan_is_loaded(), reason="for `make sanitize`")

REPORTS = {
    "read_behind_scratch": "use-after-poison",
    "read_released_scratch": "use-after-poison",
    "misaligned": "load of misaligned address",
    "shift_too_far": "shift exponent 32 is too large",
    "signed_overflow": "signed integer overflow",
    "nan_to_int": "nan is outside the range of representable values",
    "index_outside_of_an_array": "index 4 out of bounds for type 'int [4]'",
}


def fault(name: str) -> ctypes._CFuncPtr:
    from tests.sanitizers.plugin import LIBRARY

    function = getattr(ctypes.CDLL(str(LIBRARY)), name)
    function.restype = ctypes.c_float
    return function


@pytest.mark.parametrize("name", REPORTS)
def test_planted_faults_are_reported(name):
    report = death([("call", fault(name))])
    assert REPORTS[name] in str(report)
    assert f"in {name}" in report or "faults.cpp" in report


def test_scratch_is_nan_until_it_is_written():
    assert math.isnan(fault("read_unwritten_scratch")())


def heap_copy(t: torch.Tensor, short: bool) -> torch.Tensor:
    """A copy of t in a block of memory of its own that ends with it; if it is ``short``, one element before."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    block = malloc(ctypes.c_size_t((extent - short) * t.itemsize))
    copy = torch.frombuffer((ctypes.c_char * (extent * t.itemsize)).from_address(block), dtype=t.dtype, count=extent)
    copy[: extent - short].copy_(t.as_strided((extent - short,), (1,)))
    return copy.as_strided(t.shape, t.stride())


@pytest.mark.parametrize("name", ["pointwise_conv_bn_act", "mbconv"])
@torch.inference_mode()
def test_tensors_that_are_too_short_are_reported(name, backend):
    problem = sample(name)
    with Copies(lambda t, number: t) as copies:
        problem.call(backend)
    for short, argument in enumerate(copies.calls[0]):
        with Copies(lambda t, number, short=short: heap_copy(t, number == short), write_back=False):
            report = death([("call", lambda: problem.call(backend))])
        # A vector that only ends outside is an unknown crash by name.
        assert re.search("AddressSanitizer: (heap-buffer-overflow|unknown-crash)", str(report)), f"{short}: {argument}"
