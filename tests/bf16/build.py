"""The CPU library with emulated instructions: csrc/build.py's ``emulated_cpu``.

AVX-512 BF16 and AMX are made of AVX-512 (instructions.h), and where the processor has none, AVX-512 of AVX2 (avx512.h).
"""

import ctypes
import functools
from pathlib import Path

from csrc.build import EMULATE, ROOT, build
from csrc.toolchain import lacks

__all__ = ["EMULATE", "ROOT", "lacks", "library", "single_instructions", "unavailable"]


def unavailable() -> str | None:
    """Why nothing can be emulated here, or None."""
    return f"the processor lacks {', '.join(lacks('avx2'))}" if lacks("avx2") else None


def library(isa: str) -> Path:
    """The CPU library of one instruction set, to take the place of ``native._CPU_LIBRARY``; without training."""
    return build("emulated_cpu", f"{isa}.so") / f"{isa}.so"


@functools.cache
def single_instructions(of: str) -> ctypes.CDLL:
    """The instructions as functions, made "of_avx2", "of_avx512", or "natively"."""
    name = f"instructions_{of}.so"
    return ctypes.CDLL(str(build("emulated_cpu", name) / name))
