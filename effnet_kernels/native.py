"""Loading the native libraries, and the reason when one is missing.

They are built against PyTorch's stable ABI: one file serves every torch >= 2.11 and every Python.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_kernels import internals

_CPU_LIBRARY = Path(__file__).with_name("_native_cpu.so")
_CUDA_LIBRARY = Path(__file__).with_name("_native_cuda.so")
INSTRUCTION_SETS = ("auto", "generic", "avx2", "avx512", "avx512_bf16", "amx")


@functools.cache
def cpu_available() -> tuple[bool, str]:
    """Whether the CPU library is built and loads, and which instruction set it runs."""
    if not _CPU_LIBRARY.exists():
        return False, f"{_CPU_LIBRARY.name} was not built: no C++ compiler at install time (see `make build`)"
    try:
        torch.ops.load_library(_CPU_LIBRARY)
    except OSError as error:
        return False, f"{_CPU_LIBRARY.name} does not load: {error}"
    set_instruction_set(os.environ.get("EFFNET_KERNELS_CPU_ISA", "auto"))
    return True, f"native C++, {instruction_set()}"


def cuda_available() -> tuple[bool, str]:
    """Whether the CUDA library is built, loads, and has code for every GPU here; or its kernels are emulated."""
    if cuda_emulated():
        return True, "CUDA C++, emulated on the CPU"
    return _cuda_library()


def cuda_emulated() -> bool:
    """Whether tests/emulation has registered the CUDA kernels for CPU tensors."""
    try:
        torch.library.get_kernel("effnet_kernels_cuda::mbconv", "CPU")
    except RuntimeError:
        return False
    return True


@functools.cache
def _cuda_library() -> tuple[bool, str]:
    if not _CUDA_LIBRARY.exists():
        return False, f"{_CUDA_LIBRARY.name} was not built: no CUDA compiler (nvcc) at install time (see `make build`)"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False, "no NVIDIA GPU"
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        return False, f"{_CUDA_LIBRARY.name} does not load: {error}"
    for i in range(torch.cuda.device_count()):
        refusal = _ask(torch.ops.effnet_kernels_cuda.refusal, i)
        if refusal:
            return False, f"{_CUDA_LIBRARY.name} has no code for {torch.cuda.get_device_name(i)}: {refusal}"
    return True, "CUDA C++"


def _ask(op: Any, *args: Any) -> Any:
    """What an op of a library answers; whoever traces the model that asks does not see it."""
    with internals.without_modes():
        return op(*args)


def instruction_set() -> str:
    """The instruction set in use, one of ``INSTRUCTION_SETS`` less ``auto``."""
    return INSTRUCTION_SETS[_ask(torch.ops.effnet_kernels_cpu.instruction_set)]


def set_instruction_set(name: str) -> None:
    """Choose the instruction set of the CPU kernels, process-wide; ``auto`` is the last one that can run here.

    Raises:
        ValueError: no such instruction set, or this machine cannot run it, and why.
    """
    if name not in INSTRUCTION_SETS:
        raise ValueError(f"instruction set must be one of {INSTRUCTION_SETS}, got {name!r}")
    refusal = _ask(torch.ops.effnet_kernels_cpu.set_instruction_set, INSTRUCTION_SETS.index(name))
    if refusal:
        raise ValueError(f"instruction set {name!r} cannot run on this machine: {refusal}")
    _packed.clear()  # the layout of the copies belongs to the instruction set
    global _generation
    _generation += 1


_generation = 0


def generation() -> int:
    """Changes whenever packed copies made before must not be used any more."""
    return _generation


# id of a weight -> (the weight, its version, its address, its packed copy).
_packed: dict[int, tuple[weakref.ref[Tensor], int, int, Tensor]] = {}
_thread = threading.local()


@contextlib.contextmanager
def keeping_no_copies() -> Iterator[None]:
    """For calls of this thread on weights whose versions say nothing: no packed copy is kept or used again."""
    before = getattr(_thread, "keeps_no_copies", False)
    _thread.keeps_no_copies = True
    try:
        yield
    finally:
        _thread.keeps_no_copies = before


def packed(weight: Tensor) -> Tensor:
    """The copy of a convolution weight in the order that the kernels read, made once per version.

    It is dropped with the weight, and not kept inside ``keeping_no_copies``. Writes that bypass torch's version
    counter (``weight.data.copy_``) are left to the kernels, which compare a sample of the two on every call.
    """
    if weight.is_inference() or getattr(_thread, "keeps_no_copies", False):  # the first has no version counter
        return torch.ops.effnet_kernels_cpu.pack.default(weight)
    key, version, address = id(weight), internals.version(weight), weight.data_ptr()
    entry = _packed.get(key)
    if entry is not None and entry[0]() is weight and entry[1] == version and entry[2] == address:
        return entry[3]
    with torch.inference_mode(False):
        copy = torch.ops.effnet_kernels_cpu.pack.default(weight.detach())
    _packed[key] = (weakref.ref(weight, lambda _: _packed.pop(key, None)), version, address, copy)
    return copy


class Snapshot:
    """Dictionaries and the classes of objects at one moment: all keys, values and classes, by identity.

    It keeps them alive. ``holds`` is false everywhere where the library was built without Python's headers, and
    without the GIL, which keeps the dictionaries still while they are looked at.
    """

    def __init__(self, dicts: Sequence[dict[str, Any]], objects: Sequence[object]) -> None:
        self._pointer = None
        functions = _snapshots()
        if functions is not None:
            take, self._holds, forget = functions
            self._pointer = take([*dicts], [*objects])
            weakref.finalize(self, forget, self._pointer).atexit = False

    def holds(self) -> bool:
        """Whether every dictionary has the same entries in the same order, and every object the same class."""
        return self._pointer is not None and bool(self._holds(self._pointer))


@functools.cache
def _snapshots() -> tuple[Any, Any, Any] | None:
    library = ctypes.PyDLL(str(_CPU_LIBRARY))  # it leaves the GIL where it is
    if not hasattr(library, "effnet_snapshot") or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    take, holds, forget = library.effnet_snapshot, library.effnet_snapshot_holds, library.effnet_snapshot_forget
    take.argtypes, take.restype = [ctypes.py_object, ctypes.py_object], ctypes.c_void_p
    holds.argtypes, holds.restype = [ctypes.c_void_p], ctypes.c_int
    forget.argtypes, forget.restype = [ctypes.c_void_p], None
    return take, holds, forget
