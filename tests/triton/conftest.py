"""The Triton kernels run interpreted on CPU tensors where there is no GPU, natively where there is one."""

import pytest

from effnet_kernels.backends import backends
from tests.ops.conftest import one_thread, poison
from tests.ops.device import DEVICE, mark

__all__ = ["one_thread", "poison"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    available, reason = backends()["triton"]
    mark(items, "tests/triton/", None if available else reason)


@pytest.fixture(scope="package", autouse=True)
def unchecked_integers():
    """The interpreter widens integers to look for overflows and then does nothing about them: a third of its time."""
    if DEVICE == "cuda" or not backends()["triton"][0]:
        yield
        return
    from triton.runtime import interpreter

    before = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    yield
    interpreter.interpreter_builder.options = before
