"""Compiles the CPU library with emulated AVX-512 BF16 and AMX (instructions.h), once per state of the sources."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.emulation.build import CXX, ROOT, compiler_version, digest, make, one_builder

# What turns EMULATED into the build of an instruction set.
MACROS = {"avx512_bf16": [], "amx": ["-DEMULATE_AMX"]}
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "bf16"
# As setup.py, but fast to compile: what is asked here is not speed.
FLAGS = ["-O1", "-g0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fexpensive-optimizations"]  # without it GCC contracts nothing
FLAGS += ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized", f"-I{ROOT / 'csrc'}"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
EMULATED = [*AVX512, "-include", str(HERE / "instructions.h")]


def unavailable() -> str | None:
    """Why nothing can be emulated here, or None."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if not {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"} <= set(cpu.split()):
        return "the processor has no AVX-512"
    return None


def compile_object(source: Path, flags: list[str]) -> Path:
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*.h"), HERE / "instructions.h"]
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


def single_instructions(emulated: bool) -> Path:
    """The instructions as functions; those of the processor are AVX-512 BF16 alone."""
    flags = [*EMULATED, *MACROS["amx"]] if emulated else [*AVX512, "-mavx512bf16"]
    return link("single_instructions", [(HERE / "single_instructions.cpp", flags)], [])
