"""One thread, as the other tests of numbers; the reference and every build of the native kernels."""

from collections.abc import Iterator

import pytest

from effnet_kernels import native
from tests.ops.conftest import backend as cpu_build
from tests.ops.conftest import one_thread, poison
from tests.processor import NATIVE

__all__ = ["cpu_build", "one_thread", "poison"]


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in NATIVE)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name, with the instruction set chosen. In training the reference is an algorithm of its own: it is judged."""
    name, _, isa = request.param.partition("-")
    if isa:
        native.set_instruction_set(isa)
    yield name
    if isa:
        native.set_instruction_set("auto")
