"""Native calls on tensors that lie against a page which may not be touched, in a process of their own.

AddressSanitizer sees what it was compiled into. This sees every instruction of the library as it ships, masked loads
and stores included: an access outside of a tensor, on the one side or on the other, ends the process.
"""

import ctypes
import faulthandler
import mmap
import os
import signal
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

PROT_NONE = 0


def guarded(t: Tensor, at_end: bool, short: bool = False) -> Tensor:
    """A copy of t, strides and all, with a forbidden page right behind its last element or in front of its first.

    If it is ``short``, that element lies in the forbidden page.
    """
    if t.numel() == 0:
        return t
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    room = -(-extent * t.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, mmap.PAGESIZE + room + mmap.PAGESIZE)
    start = mmap.PAGESIZE + (room - extent * t.itemsize if at_end else 0)
    shift = t.itemsize * short * (1 if at_end else -1)
    copy = torch.frombuffer(area, dtype=t.dtype, count=extent, offset=start + shift)
    copy.copy_(t.as_strided((extent,), (1,)))
    page = ctypes.addressof(ctypes.c_char.from_buffer(area)) + (mmap.PAGESIZE + room if at_end else 0)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0
    return copy.as_strided(t.shape, t.stride())


class Copies:
    """Every call of a native op inside ``with`` is made on copies of its tensors; what it wrote is copied back.

    Args:
        copy: makes the copy of a tensor, given that and its number in the call.
        write_back: False where the copies are too short to be read.
    """

    def __init__(self, copy: Callable[[Tensor, int], Tensor], write_back: bool = True) -> None:
        self.copy, self.write_back = copy, write_back
        self.calls: list[list[str]] = []  # per call the arguments that its tensors belong to
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Copies":
        call = torch._ops.OpOverload.__call__

        def on_copies(op: torch._ops.OpOverload, /, *args: Any) -> Any:
            if op.namespace != "effnet_kernels_cpu" or op._schema.returns:
                return call(op, *args)
            copies, names = [], []
            for argument, value in zip(op._schema.arguments, args, strict=True):
                leaves, spec = tree_flatten(value)
                for i, leaf in enumerate(leaves):
                    if isinstance(leaf, Tensor):
                        leaves[i] = self.copy(leaf, len(names))
                        names.append(argument.name)
                copies.append(tree_unflatten(leaves, spec))
            self.calls.append(names)
            call(op, *copies)
            for argument, value, copy in zip(op._schema.arguments, args, copies, strict=True):
                if argument.is_write and value is not None and self.write_back:
                    value.copy_(copy)
            return None

        self._patch.setattr(torch._ops.OpOverload, "__call__", on_copies)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def death(jobs: Iterable[tuple[str, Callable[[], object]]]) -> str | None:
    """Run named jobs one after the other in a forked process: None, or what ended it.

    That is the signal and the job, or what the job printed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        os.dup2(writer, 2)  # standard error
        faulthandler.disable()  # pytest's, which would print a hundred lines
        try:
            for name, job in jobs:
                os.write(writer, f"{name}\n".encode())
                job()
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"{signal.Signals(os.WTERMSIG(status)).name} in {told.splitlines()[-1]}"
    return told if status else None
