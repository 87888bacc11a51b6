"""Loads CUDA sources compiled against the emulation (csrc/build.py); see README.md in this folder.

``load()`` gives the package's kernels, with their ops registered as torch.ops.effnet_kernels_cuda.*;
``load_fixtures()`` the kernels that the emulation tests itself with.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import subprocess
import sys
from types import ModuleType
from typing import Any

from csrc.build import ROOT, build
from csrc.toolchain import CXX, cuda_include

__all__ = ["ROOT", "as_cuda", "asan_environment", "asan_is_loaded", "load", "load_fixtures", "unavailable"]

KEPT: list[object] = []  # registrations last as long as their objects


def unavailable() -> str | None:
    """Why nothing can be emulated here, or None."""
    if not sys.platform.startswith("linux"):
        return "the emulation needs Linux"
    if shutil.which(CXX[0]) is None:
        return f"no C++ compiler: {CXX[0]}"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if cuda_include() is None:
        return "cuda_fp16.h was found neither in CUDA_HOME nor in the wheels that torch installs"
    return None


def asan_environment() -> dict[str, str]:
    """Variables with which a process can load a library built with AddressSanitizer."""
    libraries = [
        subprocess.run([*CXX, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the second, or exceptions are not intercepted
    ]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0:strict_init_order=0"}


def asan_is_loaded() -> bool:
    return hasattr(ctypes.CDLL(None), "__asan_init")


def module(name: str, asan: bool) -> ModuleType:
    """One of the modules of csrc/build.py's ``emulation``, brought up to date and imported."""
    if asan and not asan_is_loaded():
        raise RuntimeError("start Python with the variables of asan_environment()")
    file = build("emulation_with_asan" if asan else "emulation", f"{name}.so") / f"{name}.so"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    loaded.set_device(90)
    return loaded


@functools.cache
def load_fixtures(asan: bool = False) -> ModuleType:
    """The module with `run`, `set_seed` and the rest of module.cpp, over fixtures.cu."""
    return module("emulation_fixtures", asan)


@functools.cache
def load(asan: bool | None = None) -> ModuleType:
    """The package's CUDA kernels, emulated: afterwards torch.ops.effnet_kernels_cuda.* serves CPU tensors.

    Returns the module that steers them: module.cpp has its functions. With AddressSanitizer on request, or
    where the process has been started with it.
    """
    emulation = module("emulated_kernels", asan_is_loaded() if asan is None else asan)
    serve_cpu_tensors(emulation)
    return emulation


def as_cuda(tree: Any, device: int = -1) -> Any:
    """Every tensor's memory as a tensor on that device, or on the current one; whoever calls keeps the tensors."""
    import torch
    from torch.utils._pytree import tree_map_only

    return tree_map_only(torch.Tensor, lambda x: torch.ops.effnet_kernels_emulation.on_device(x, device), tree)


def serve_cpu_tensors(emulation: ModuleType) -> None:
    """Registers for the CPU what the library has for CUDA: the same ops, on the same memory as a device has it."""
    import torch

    library = torch.library.Library("effnet_kernels_cuda", "IMPL")
    under_way: list[object] = []  # deferred launches read and write it

    def bind(name: str) -> None:
        op = getattr(torch.ops.effnet_kernels_cuda, name).default

        def run(*args: object) -> object:
            if not emulation.deferred():
                under_way.clear()
            under_way.append(args)
            return op(*as_cuda(args))

        library.impl(name, run, "CPU")

    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        if name.startswith("effnet_kernels_cuda::"):
            bind(name.partition("::")[2])
    KEPT.append(library)
