"""Puts the sanitized library in the place of the package's, before anything asks for it."""

from pathlib import Path

from effnet_kernels import native

LIBRARY = Path(__file__).resolve().parents[2] / "build" / "sanitized" / "_native_cpu.so"

native._CPU_LIBRARY = LIBRARY
available, reason = native.cpu_available()
if not available:
    raise ImportError(reason)
