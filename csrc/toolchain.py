"""What the libraries are built with and for: the C++ compiler and instruction sets, torch, and a CUDA compiler with its
headers, its runtime and GPUs."""

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path

# As other builds take them: a compiler may have a launcher in front and flags behind it.
CXX = shlex.split(os.environ.get("CXX") or "g++")
CXXFLAGS, LDFLAGS = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
# GPUs that the CUDA library has machine code for, unless TORCH_CUDA_ARCH_LIST says others; and PTX of the newest.
CUDA_ARCHITECTURES = "8.0 8.6 8.9 9.0a 10.0a 12.0+PTX"
# `make wheel`: of the compilers, one whose library runs under older drivers: those for its own major version of CUDA,
# and later ones.
PORTABLE = os.environ.get("EFFNET_KERNELS_PORTABLE", "") not in ("", "0")
INSTALLED = Path("/usr/local")


class NoCudaError(RuntimeError):
    """No CUDA compiler, or no GPU, that the library could be built with or for: no fault of a build."""


# What each instruction set needs of a processor, in ascending order: the one list. Of all but the last two there is a
# build of the training kernels, too; at run time csrc/cpu/instruction_sets.cpp takes the last that the processor has.
INSTRUCTION_SETS = {
    "generic": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"),
    "avx512_bf16": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "avx512bf16"),
    "amx": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "avx512bf16", "amx-tile", "amx-bf16"),
}
TRAINED = ("generic", "avx2", "avx512")


def machine_flags(isa: str) -> list[str]:
    return [f"-m{feature}" for feature in INSTRUCTION_SETS[isa]]


@functools.cache
def lacks(isa: str) -> list[str]:
    """What an instruction set needs and this processor has not."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    words = cpu.replace("avx512_bf16", "avx512bf16").replace("amx_", "amx-").split()
    return [feature for feature in INSTRUCTION_SETS[isa] if feature not in words]


@functools.cache
def known_sets() -> list[str]:
    """The instruction sets that the compiler knows: GCC below 11 does not know AMX, others no x86 at all."""

    def known(isa: str) -> bool:
        command = [*CXX, *machine_flags(isa), "-fsyntax-only", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [isa for isa in INSTRUCTION_SETS if isa == "generic" or (x86 and known(isa))]


def list_of_builds(kernels: Iterable[str], training: Iterable[str], needs: bool = True) -> list[str]:
    """What instruction_sets.cpp is told: X(name, features...) for each build of the kernels, T(name) of training."""
    features = {isa: "".join(f', "{feature}"' for feature in INSTRUCTION_SETS[isa] if needs) for isa in kernels}
    sets = " ".join(f"X({isa}{features[isa]})" for isa in features)
    return [f"-DEFFNET_KERNELS={sets}", f"-DEFFNET_TRAIN_KERNELS={' '.join(f'T({isa})' for isa in training)}"]


def torch_flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags for the stable ABI of torch 2.11."""
    torch = importlib.util.find_spec("torch")  # found, not imported, which would take longer than much of a build
    if torch is None or torch.origin is None:
        raise RuntimeError("torch is not installed: pip install torch, then --no-build-isolation")
    root = Path(torch.origin).parent
    compile_flags = ["-isystem", str(root / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    # torch is loaded first, always: no run path is needed.
    return compile_flags, [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]


def find_nvcc() -> tuple[Path, tuple[int, int]]:
    """The CUDA compiler, of CUDA_HOME, of PATH, or of the wheels of the toolkit (nvidia-cuda-nvcc), and its version.

    For a wheel that is to be portable, where CUDA_HOME has none: the newest of CUDA 12 that knows all architectures and
    has its libraries. (The package index has wheels of a compiler for CUDA 13 only.)

    Raises:
        NoCudaError: there is none of CUDA 12.4 or later.
        RuntimeError: there is one that does not work.
    """
    told = [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    on_path = shutil.which("nvcc")
    candidates = [*told, Path(on_path)] if on_path else [*told]
    candidates += INSTALLED.glob("cuda-*/bin/nvcc") if PORTABLE else []
    candidates += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvcc"), reverse=True)
    found: dict[Path, tuple[int, int]] = {}
    old, broken = [], []
    for nvcc in filter(Path.exists, candidates):
        try:  # it may be a script, or broken: ask
            version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            broken.append(f"{nvcc}: {error}")
            continue
        release = re.search(r"release (\d+)\.(\d+)", version)
        if release is None:
            broken.append(f"{nvcc} --version does not say its release")
        elif (int(release[1]), int(release[2])) >= (12, 4):
            found[nvcc] = int(release[1]), int(release[2])
        else:
            old.append(f"{nvcc} is of CUDA {release[1]}.{release[2]}, 12.4 is the oldest that will do")
    if found:
        nvcc = next(iter(found))
        if PORTABLE and nvcc not in told:
            flags = architecture_flags(asked_architectures())
            fit = [other for other in found if found[other][0] == 12 and complete(other, flags)]
            nvcc = max(fit, key=found.__getitem__, default=nvcc)
        return nvcc, found[nvcc]
    if broken:
        raise RuntimeError("; ".join(broken))
    raise NoCudaError("; ".join(old) or "nvcc is neither in CUDA_HOME nor in PATH")


def dry_run(nvcc: Path, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """What nvcc says that it would do; it fails where it does not know an architecture."""
    command = [str(nvcc), "--dryrun", *flags, "-c", "-x", "cu", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def complete(nvcc: Path, flags: list[str]) -> bool:
    """Whether a compiler of CUDA 12 knows these architectures, and its headers and libraries are there."""
    try:
        cuda_folders(nvcc, 12)
    except RuntimeError:
        return False
    return dry_run(nvcc, flags).returncode == 0


def cuda_folders(nvcc: Path, major: int) -> tuple[list[str], Path]:
    """Folders of CUDA's headers, the compiler's own first, then torch's of its major version; libcudart_static.a."""
    tops = [Path(top) for top in re.findall(r"^#\$ TOP=(.+)$", dry_run(nvcc, []).stderr, re.MULTILINE)]
    tops += Path(sysconfig.get_path("purelib"), "nvidia").glob(f"cu{major}")
    libraries = [
        top / folder / "libcudart_static.a" for top in tops for folder in ("lib64", "lib", "targets/x86_64-linux/lib")
    ]
    runtime = next((library for library in libraries if library.exists()), None)
    if runtime is None:
        raise RuntimeError(f"libcudart_static.a is in none of {sorted({str(library.parent) for library in libraries})}")
    return list(dict.fromkeys(str(top / "include") for top in tops if (top / "include").is_dir())), runtime


def asked_architectures() -> list[str]:
    """Those of TORCH_CUDA_ARCH_LIST that the kernels run on; as torch reads it, "8.0;9.0a+PTX" or "8.0 9.0a+PTX"."""
    names = []
    for name in re.split(r"[ ;]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or CUDA_ARCHITECTURES):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if found is None:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST must be like '8.0 9.0a 12.0+PTX', got {name!r}")
        if int(found[1]) >= 8:  # bfloat16 and the asynchronous copy begin with 8.0
            names.append(name)
    if not names:
        raise NoCudaError("TORCH_CUDA_ARCH_LIST has no architecture from 8.0 on, which the CUDA kernels need")
    return names


def architecture_flags(architectures: list[str]) -> list[str]:
    """nvcc's flags for "9.0a" or, with PTX, "12.0+PTX"."""
    flags = []
    for name in architectures:
        number, _, ptx = name.replace(".", "").partition("+")
        codes = [f"sm_{number}", f"compute_{number}"] if ptx else [f"sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


@functools.cache
def cuda_include() -> Path | None:
    """The folder with cuda_fp16.h: of the toolkit, or of the wheels that torch depends on."""
    candidates = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"), reverse=True)
    candidates.append(Path("/usr/local/cuda/include"))
    needed = ("cuda_fp16.h", "cuda_bf16.h", "cuda_runtime_api.h")
    return next((path for path in candidates if all((path / name).is_file() for name in needed)), None)
