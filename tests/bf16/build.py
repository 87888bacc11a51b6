"""Compiles the CPU library with emulated instructions, once per state of the sources.

AVX-512 BF16 and AMX are made of AVX-512 (instructions.h), and where the processor has none, AVX-512 of AVX2 (avx512.h).
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.emulation.build import CXX, ROOT, compiler_version, digest, make, one_builder

# What turns EMULATED into the build of an instruction set.
MACROS = {"avx512": [], "avx512_bf16": ["-DEMULATE_AVX512_BF16"], "amx": ["-DEMULATE_AMX"]}
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "bf16"
# As setup.py, but fast to compile: what is asked here is not speed.
FLAGS = ["-O1", "-g0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fexpensive-optimizations"]  # without it GCC contracts nothing
FLAGS += ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized", f"-I{ROOT / 'csrc'}"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]


def lacks(flags: list[str]) -> list[str]:
    """Which instruction sets, of those that the compiler is told to use, the processor has not."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return [flag.removeprefix("-m") for flag in flags if flag.removeprefix("-m") not in cpu.split()]


INSTRUCTIONS = ["-include", str(HERE / "instructions.h")]
EMULATED = [*(AVX2 if lacks(AVX512) else AVX512), *INSTRUCTIONS]
# What the instructions one by one are compiled of: of the last two, plain AVX-512 is the processor's, and of the last
# one AVX-512 BF16 is, too, and AMX is not there.
SINGLE = {
    "of AVX2": [*AVX2, *INSTRUCTIONS, *MACROS["amx"]],
    "of AVX-512": [*AVX512, *INSTRUCTIONS, *MACROS["amx"]],
    "the processor's": [*AVX512, "-mavx512bf16"],
}


def unavailable() -> str | None:
    """Why nothing can be emulated here, or None."""
    return f"the processor lacks {', '.join(lacks(AVX2))}" if lacks(AVX2) else None


def compile_object(source: Path, flags: list[str]) -> Path:
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*.h"), *HERE.glob("*.h")]
    command = [CXX, *FLAGS, *flags, "-c", str(source)]
    key = digest([compiler_version(), *command, *(path.read_bytes() for path in (source, *sorted(headers)))])
    return make(BUILD / f"{source.stem}-{key}.o", command)


def link(name: str, jobs: list[tuple[Path, list[str]]], flags: list[str]) -> Path:
    with one_builder(name), ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda job: compile_object(*job), jobs))
        return make(
            BUILD / f"{name}-{digest(path.name for path in objects)}.so", [CXX, "-shared", *map(str, objects), *flags]
        )


def library(sets: Sequence[str]) -> Path:
    """The CPU library of these instruction sets, to take the place of ``native._CPU_LIBRARY``; without training."""
    import torch

    root = Path(torch.__file__).parent
    torch_flags = ["-isystem", str(root / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    cpu = ROOT / "csrc" / "cpu"
    jobs = [
        *((cpu / "kernels.cpp", [*EMULATED, *MACROS[isa]]) for isa in sets),
        (ROOT / "csrc" / "bindings_cpu.cpp", torch_flags),
        (cpu / "scratch.cpp", []),
        (HERE / "instruction_sets.cpp", [f"-DEMULATED_{isa.upper()}" for isa in sets]),
    ]
    return link("emulated_cpu", jobs, [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"])


@functools.cache
def single_instructions(of: str) -> ctypes.CDLL:
    """The instructions as functions."""
    return ctypes.CDLL(str(link("single_instructions", [(HERE / "single_instructions.cpp", SINGLE[of])], [])))
