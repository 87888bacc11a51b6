"""The CUDA kernels run natively where there is a GPU and the library is built, emulated on CPU tensors elsewhere."""

from collections.abc import Iterator
from types import ModuleType

import pytest

from effnet_kernels import native
from tests.emulation import build
from tests.ops.conftest import one_thread, poison
from tests.ops.device import DEVICE, mark

__all__ = ["one_thread", "poison"]


def _missing() -> str | None:
    """Why the kernels run in neither way."""
    if DEVICE == "cuda":
        available, reason = native.cuda_available()
        return None if available else reason
    return build.unavailable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items, "tests/cuda/", _missing())


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Registers the emulated kernels where there is no GPU."""
    if DEVICE == "cpu" and _missing() is None:
        build.load()


@pytest.fixture(params=range(3))
def schedule(request: pytest.FixtureRequest) -> Iterator[int]:
    """The order in which threads and blocks run, three of them; a GPU has its own."""
    if DEVICE == "cuda":
        if request.param:
            pytest.skip("one run on a GPU is as good as another")
        yield 0
        return
    build.load().set_seed(request.param)
    yield request.param
    build.load().set_seed(0)


@pytest.fixture
def emulation(kernels: None) -> ModuleType | None:
    """The module that steers the emulation; None on a GPU."""
    return None if DEVICE == "cuda" else build.load()


@pytest.fixture(params=[80, 86, 90])
def device(request: pytest.FixtureRequest, emulation: ModuleType | None) -> Iterator[int]:
    """The emulated GPU by its compute capability: its shared memory decides how kernels cut a problem."""
    if emulation is None:
        pytest.skip("the GPU is what it is")
    emulation.set_device(request.param)
    yield request.param
    emulation.set_device(90)


@pytest.fixture(params=["all", "one"])
def multiprocessors(request: pytest.FixtureRequest, emulation: ModuleType | None) -> Iterator[None]:
    """Those of the GPU, or one, on which small problems are cut like large ones."""
    if request.param == "all":
        yield
        return
    if emulation is None:
        pytest.skip("the GPU is what it is")
    emulation.set_device(90, multiprocessors=1)
    yield
    emulation.set_device(90)
