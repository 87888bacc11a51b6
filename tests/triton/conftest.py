"""The Triton kernels run interpreted on CPU tensors where there is no GPU, natively where there is one."""

import pytest

from effnet_kernels.dispatch import backends
from tests.ops.conftest import one_thread, poison
from tests.ops.device import DEVICE, mark

__all__ = ["one_thread", "poison"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    available, reason = backends()["triton"]
    mark(items, "tests/triton/", None if available else reason)


@pytest.fixture(scope="package", autouse=True)
def interpreted():
    """Three changes to the interpreter.

    It widens integers to look for overflows and then does nothing about them: a third of its time, left out. Its
    matrix products are those of the BLAS that NumPy came with, whose float32 sums may depend on where in a tile a row
    lies: they are summed in float64 and rounded once. Its powers of two may be subnormal: a GPU's are then zero.
    """
    if DEVICE == "cuda" or not backends()["triton"][0]:
        yield
        return
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    options, dot = builder.options, builder.create_dot

    def dot_in_float64(a, b, d, *how):
        result = dot(a, b, interpreter.TensorHandle(d.data.astype("float64"), tl.float64), *how)
        return interpreter.TensorHandle(result.data.astype(d.data.dtype), d.dtype.scalar)

    def exp2_as_on_a_gpu(x):  # ex2.approx.ftz.f32
        y = np.exp2(x.data)
        return interpreter.TensorHandle(np.where(y < np.finfo(np.float32).tiny, np.float32(0), y), x.dtype.scalar)

    builder.options, builder.create_dot = interpreter.InterpreterOptions(sanitize_overflow=False), dot_in_float64
    builder.create_exp2 = exp2_as_on_a_gpu
    yield
    builder.options = options
    del builder.create_dot, builder.create_exp2
