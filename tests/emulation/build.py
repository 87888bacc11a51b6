"""Compiles CUDA sources against the emulation and loads them; see README.md in this folder.

``load()`` gives the package's kernels, with their ops registered as torch.ops.effnet_kernels_cuda.*;
``load_fixtures()`` the kernels that the emulation tests itself with. What is up to date is not compiled again.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulation"
INCLUDE = [HERE / "include", HERE, ROOT / "csrc"]

CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
# Kernels read memory through pointers of other types, as nvcc lets them.
FLAGS += ["-fno-strict-aliasing", "-Wno-class-memaccess", "-fno-extern-tls-init", "-Wno-unused-function"]
KERNEL_FLAGS = ["-x", "c++", "-DCUDA_EMULATION", "-include", "cuda_runtime.h"]
# A call before every load and store of a kernel, for include/cuda_emulation/accesses.h. With -O1 they are those of the
# source, not put together.
ACCESS_FLAGS = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-fno-tree-sra"]
ASAN_FLAGS = ["-fsanitize=address,bounds,alignment", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
# Checks as calls: in unrolled kernels the compiler takes half the time for them.
ASAN_FLAGS += ["--param", "asan-instrumentation-with-call-threshold=0"]
# What the bindings ask of torch on a device, which torch.cpp answers.
TORCH = ["dlopen", "dlsym", "torch_call_dispatcher", "aoti_torch_create_device_guard", "aoti_torch_delete_device_guard"]
KEPT: list[object] = []  # registrations last as long as their objects


# ---- what the machine has --------------------------------------------------------------------------------------


@functools.cache
def cuda_include() -> Path | None:
    """The folder with cuda_fp16.h: of the toolkit, or of the wheels that torch depends on."""
    candidates = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"), reverse=True)
    candidates.append(Path("/usr/local/cuda/include"))
    needed = ("cuda_fp16.h", "cuda_bf16.h", "cuda_runtime_api.h")
    return next((path for path in candidates if all((path / name).is_file() for name in needed)), None)


def unavailable() -> str | None:
    """Why nothing can be emulated here, or None."""
    if not sys.platform.startswith("linux"):
        return "the emulation needs Linux"
    if shutil.which(CXX) is None:
        return f"no C++ compiler: {CXX}"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if cuda_include() is None:
        return "cuda_fp16.h was found neither in CUDA_HOME nor in the wheels that torch installs"
    return None


@functools.cache
def machine_flags() -> list[str]:
    """Fused multiply-add as on the GPU, where the processor has it."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    words = set(cpu.split())
    return ["-mavx2", "-mfma", "-mf16c"] if {"avx2", "fma", "f16c"} <= words else []


# ---- AddressSanitizer ------------------------------------------------------------------------------------------


def asan_environment() -> dict[str, str]:
    """Variables with which a process can load a library built with AddressSanitizer."""
    libraries = [
        subprocess.run([CXX, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the second, or exceptions are not intercepted
    ]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0:strict_init_order=0"}


def asan_is_loaded() -> bool:
    return hasattr(ctypes.CDLL(None), "__asan_init")


# ---- building --------------------------------------------------------------------------------------------------


def closure(source: Path) -> list[Path]:
    """The file and those it includes, of the folders in INCLUDE."""
    found: dict[Path, None] = {}
    pending = [source, HERE / "include" / "cuda_runtime.h"]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found[path] = None
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
            candidates = [folder / name for folder in (path.parent, *INCLUDE)]
            pending += [candidate for candidate in candidates if candidate.is_file()][:1]
    return list(found)


def digest(parts: Iterable[str | bytes]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.hexdigest()[:16]


@functools.cache
def compiler_version() -> str:
    return subprocess.run([CXX, "--version"], check=True, capture_output=True, text=True).stdout


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-8000:]}")
    sys.stderr.write(result.stderr)


def make(output: Path, command: list[str]) -> Path:
    """Runs a command that writes `output`, whose name says what it was made from, unless it is there."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_suffix(f".{os.getpid()}.tmp")
        run([*command, "-o", str(temporary)])
        temporary.rename(output)
    return output


def compile_object(source: Path, flags: list[str]) -> Path:
    include = [f"-I{path}" for path in INCLUDE] + ["-isystem", str(cuda_include())]
    command = [CXX, *FLAGS, *machine_flags(), *include, *flags, "-c", str(source)]
    key = digest([compiler_version(), *command, *(path.read_bytes() for path in closure(source))])
    return make(BUILD / "objects" / f"{source.stem}-{key}.o", command)


def dynamic_shared_memory(objects: list[Path]) -> list[str]:
    """Linker flags: every namespace's `extern __shared__ ... shared_memory[]` is the one buffer."""
    listed = subprocess.run(["nm", "-u", *map(str, objects)], check=True, capture_output=True, text=True).stdout
    symbols = sorted(set(re.findall(r"U (_Z\w*13shared_memory\w*)", listed)))
    return [f"-Wl,--defsym={symbol}=cuda_emulation_shared_memory" for symbol in symbols]


@contextmanager
def one_builder(name: str) -> Iterator[None]:
    """Test processes that run side by side must not all compile."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(
    name: str, sources: list[tuple[Path, list[str]]], *, asan: bool, link: list[str], defines: list[str]
) -> ModuleType:
    """Compiles sources, each with its flags, into a library, and a Python module that steers it; imports that."""
    if asan and not asan_is_loaded():
        raise RuntimeError("start Python with the variables of asan_environment()")
    import pybind11

    def instrument(source: Path) -> list[str]:
        return ASAN_FLAGS if asan else ACCESS_FLAGS if source.suffix == ".cu" else []

    python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    jobs = [(HERE / "emulation.cpp", [*KERNEL_FLAGS, "-O2"]), *sources]
    jobs = [(source, [*flags, *instrument(source)]) for source, flags in jobs]
    jobs.append((HERE / "module.cpp", [*python, f"-DMODULE={name}", *defines]))
    with one_builder(name), ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        *objects, module_object = pool.map(lambda job: compile_object(*job), jobs)
        folder = BUILD / f"{name}-{digest(path.name for path in (*objects, module_object))}"
        linker = [CXX, "-shared", *(ASAN_FLAGS if asan else [])]
        library = make(
            folder / f"lib{name}.so",
            [*linker, f"-Wl,-soname,lib{name}.so", *map(str, objects), *dynamic_shared_memory(objects), *link],
        )
        module = make(folder / f"{name}.so", [*linker, str(module_object), str(library), "-Wl,-rpath,$ORIGIN"])
    spec = importlib.util.spec_from_file_location(name, module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    loaded.set_device(90)
    return loaded


@functools.cache
def load_fixtures(asan: bool = False) -> ModuleType:
    """The module with `run`, `set_seed` and the rest of module.cpp, over fixtures.cu."""
    sources = [(HERE / "fixtures.cu", KERNEL_FLAGS)]
    return build("emulation_fixtures", sources, asan=asan, link=[], defines=["-DWITH_FIXTURES"])


@functools.cache
def load(asan: bool | None = None) -> ModuleType:
    """The package's CUDA kernels, emulated: afterwards torch.ops.effnet_kernels_cuda.* serves CPU tensors.

    Returns the module that steers them: module.cpp has its functions. With AddressSanitizer on request, or
    where the process has been started with it.
    """
    import torch

    root = Path(torch.__file__).parent
    torch_flags = ["-isystem", str(root / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    csrc = ROOT / "csrc"
    sources = [(source, KERNEL_FLAGS) for source in sorted(csrc.glob("cuda/*.cu"))]
    as_for_a_gpu = [*torch_flags, '-DEFFNET_CUDA_ARCHITECTURES="8.0"']
    sources += [(source, as_for_a_gpu) for source in sorted(csrc.glob("bindings_cuda*.cpp"))]
    version = f'-DTORCH="{torch.__version__}"'  # whose own ABI it uses: another one is compiled for anew
    sources.append((HERE / "torch.cpp", ["-DCUDA_EMULATION", *torch_flags[:2], version]))
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *(f"-Wl,--wrap={function}" for function in TORCH)]
    asan = asan_is_loaded() if asan is None else asan
    emulation = build("emulated_kernels", sources, asan=asan, link=link, defines=[])
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
