"""Loading the native libraries, and the reason when one is missing.

They are built against PyTorch's stable ABI: one file serves every torch >= 2.11 and every Python.
"""

import functools
import os
from pathlib import Path
from typing import Any

import torch

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
