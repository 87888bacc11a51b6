"""Recording: which native calls a forward comes down to, noted where they are made."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """A native call from one map to the next, in a form to be repeated: csrc/bindings_cpu_program.h."""

    settings: tuple[Any, ...]  # what it was packed by: op, dtype of the maps, instruction set, epsilons, stride
    sources: list[Tensor]  # all tensors that it was made of, as the modules hold them
    memory: list[Tensor]  # where they were then, and how they lay there
    table: Tensor  # what was in it
    packed: Tensor  # what was made of them
    kept: Tensor  # its parameters, which point into ``packed``


class Recording:
    """The calls from ``x`` on, as long as each is made on what the one before gave.

    Args:
        x: what the forward is called with.
        known: calls made before of the same modules: what is still right of them is shared.
        constant: whether that is all of it, whatever the modules hold now.
    """

    def __init__(self, x: Tensor, known: Sequence[Call] = (), constant: bool = False) -> None:
        self.known, self.constant = known, constant
        self.calls: list[Call] = []
        self.covered: set[int] = set()  # ids of the modules that were not called because the calls stand for them
        self.first = x  # x as the first call takes it
        self._last: Tensor | None = x
        # Tensors that are others in another dtype or order of memory, and those.
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}

    def ends_in(self, y: object) -> bool:
        """Whether ``y`` is what the last of the calls gave, and there is nothing else on the way to it."""
        return bool(self.calls) and y is self._last

    def convert(self, original: Tensor, converted: Tensor) -> None:
        """Note that a tensor was made of another, which stands for it."""
        self._originals[id(converted)] = converted, original

    def original(self, t: Tensor) -> Tensor:
        while id(t) in self._originals:
            t = self._originals[id(t)][1]
        return t

    def follow(self, x: Tensor, first: Tensor, calls: Sequence[Call], y: Tensor) -> None:
        """Note that these calls led from x to y; the first of them took x as ``first``, maybe in another dtype."""
        if x is not self._last or (self.calls and first is not x):
            self.lose()
            return
        if not self.calls:
            self.first = first
        self.calls += calls
        self._last = y

    def lose(self) -> None:
        """Note that something was done that no such call stands for."""
        self._last = None


_current: ContextVar[Recording | None] = ContextVar("effnet_kernels_recording", default=None)


def current() -> Recording | None:
    return _current.get()


@contextlib.contextmanager
def recording(into: Recording | None) -> Iterator[None]:
    """Note the native calls that are made inside the ``with`` block, or do not."""
    token = _current.set(into)
    try:
        yield
    finally:
        _current.reset(token)


def converted(t: Tensor, convert: Callable[..., Tensor], *args: Any) -> Tensor:
    """``convert(t, *args)``, which is t in another dtype or order of memory."""
    result = convert(t, *args)
    if torch.compiler.is_compiling():
        return result
    into = _current.get()
    if into is not None and result is not t:
        into.convert(t, result)
    return result
