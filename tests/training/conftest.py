"""One thread, as the other tests of numbers; every build of the native kernels."""

from tests.ops.conftest import backend, one_thread, poison

__all__ = ["backend", "one_thread", "poison"]
