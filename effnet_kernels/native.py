"""Loading the native libraries, and the reason when one is missing.

They are built against PyTorch's stable ABI: one file serves every torch >= 2.11 and every Python.
"""

import functools
import os
import re
from pathlib import Path
from typing import Any

import torch

from effnet_kernels import internals

_CPU_LIBRARY = Path(__file__).with_name("_native_cpu.so")
_CUDA_LIBRARY = Path(__file__).with_name("_native_cuda.so")
# The first NVIDIA driver for each major version of CUDA: within one, an older driver runs what a newer toolkit built.
_DRIVERS = {12: 525, 13: 580}
# Machine code for these, which are no cards but parts of a Tegra chip, runs there alone, and no other code does.
_TEGRA = ((8, 7), (10, 1), (11, 0))


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
    """Whether the CUDA library is built, loads, and has code for a GPU here; or its kernels are emulated."""
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
    built_for, toolkit, driver = _cuda_build()
    built_with = f"built with CUDA {_release(toolkit)}"
    if driver // 1000 < toolkit // 1000:
        first = _DRIVERS.get(toolkit // 1000)
        needed = f"NVIDIA driver {first} or newer" if first else "a newer NVIDIA driver"
        reason = f"was {built_with}, which needs {needed}; this one is for CUDA {_release(driver)}"
        return False, f"{_CUDA_LIBRARY.name} {reason}"
    answers = [cuda_serves(f"cuda:{i}") for i in range(torch.cuda.device_count())]
    if not any(served for served, _ in answers):
        return False, "; ".join(dict.fromkeys(reason for _, reason in answers))
    return True, f"CUDA C++, {built_with} for {built_for}"


def cuda_serves(device: str) -> tuple[bool, str]:
    """Whether the CUDA library, once loaded, has code for one GPU, "cuda:1" or "cuda", the current one.

    No other one is asked.
    """
    index = torch.device(device).index
    return _serves(torch.cuda.current_device() if index is None else index)


@functools.cache
def _serves(index: int) -> tuple[bool, str]:
    capability = torch.cuda.get_device_capability(index)
    built_for, toolkit, driver = _cuda_build()
    if has_code(capability, built_for, toolkit, driver):
        return True, "any shape"
    reason = (
        f"{_CUDA_LIBRARY.name} has no code for {torch.cuda.get_device_name(index)}, compute capability "
        f"{capability[0]}.{capability[1]}: it was built for {built_for}"
    )
    if driver < toolkit:
        reason += f", and a driver for CUDA {_release(driver)} compiles no PTX of CUDA {_release(toolkit)}"
    return False, reason


def has_code(capability: tuple[int, int], built_for: str, toolkit: int, driver: int) -> bool:
    """Whether a library has code for a GPU.

    Machine code runs on GPUs of its major version, from its minor version on; that with an "a", and on Tegra chips, on
    its own capability only. PTX without a letter runs on all later GPUs, too, where the driver, which compiles it, is
    not older than the toolkit.

    Args:
        capability: the GPU's compute capability.
        built_for: as TORCH_CUDA_ARCH_LIST has it, "8.0 9.0a 12.0+PTX".
        toolkit, driver: their versions of CUDA, 13000 for 13.0.
    """
    for major, minor, letter, ptx in re.findall(r"(\d+)\.(\d+)([af]?)(\+PTX)?", built_for):
        built = int(major), int(minor)
        tegra = capability in _TEGRA or built in _TEGRA
        related = (capability[0] == built[0] and not tegra) or (ptx and not letter and driver >= toolkit)
        if capability == built or (capability > built and letter != "a" and related):
            return True
    return False


def _cuda_build() -> tuple[str, int, int]:
    """What the CUDA library was built for, with which CUDA, and the CUDA of the driver."""
    ops = torch.ops.effnet_kernels_cuda
    return _ask(ops.built_for), _ask(ops.toolkit), _ask(ops.driver)


def _release(version: int) -> str:
    """13.0 of 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _ask(op: Any, *args: Any) -> Any:
    """What an op of a library answers; whoever traces the model that asks does not see it."""
    with internals.without_modes():
        return op(*args)


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Those that the CPU library was built for, each of which includes the ones before it."""
    return tuple(_ask(torch.ops.effnet_kernels_cpu.instruction_sets).split())


def instruction_set() -> str:
    """The instruction set in use."""
    return instruction_sets()[_ask(torch.ops.effnet_kernels_cpu.instruction_set)]


def set_instruction_set(name: str) -> None:
    """Choose the instruction set of the CPU kernels, process-wide; ``auto`` is the last one that can run here.

    Raises:
        ValueError: no such instruction set, or this machine cannot run it, and why.
    """
    known = ("auto", *instruction_sets())
    if name not in known:
        raise ValueError(f"instruction set must be one of {known}, got {name!r}")
    refusal = _ask(torch.ops.effnet_kernels_cpu.set_instruction_set, known.index(name) - 1)
    if refusal:
        raise ValueError(f"instruction set {name!r} cannot run on this machine: {refusal}")
