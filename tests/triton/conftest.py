"""The Triton kernels run interpreted on CPU tensors where there is no GPU, natively where there is one."""

import pytest
import torch

from effnet_kernels.backends import backends
from tests.triton.tools import DEVICE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU these are the tests that ``-m gpu`` asks for."""
    here = [item for item in items if "tests/triton/" in item.path.as_posix()]
    available, reason = backends()["triton"]
    for item in here:
        if DEVICE == "cuda":
            item.add_marker(pytest.mark.gpu)
        if not available:
            item.add_marker(pytest.mark.skip(reason=reason))


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


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison():
    """Fill every fresh tensor, outputs and scratch alike, with NaN: an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
