"""Builds the native libraries. Everything else about the package is in pyproject.toml.

They use PyTorch's stable ABI, so one library serves every torch >= 2.11 and every Python, and the wheel is
tagged accordingly. For `pip install` a library that cannot be built costs its backend, never the package; for
`make`, which sets EFFNET_KERNELS_REQUIRE_NATIVE, it is an error. A library of an earlier build never outlives a build.
`make wheel` sets EFFNET_KERNELS_PORTABLE: of the CUDA compilers, one whose library runs under older drivers.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
# GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for uninitialised variables.
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
COMMON = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    *WARNINGS,
]
# `make sanitize`: the CPU library alone, under AddressSanitizer and UndefinedBehaviorSanitizer, with planted faults.
SANITIZED = "EFFNET_KERNELS_SANITIZE" in os.environ
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"] if SANITIZED else []
if SANITIZED:  # Python was built with -fwrapv, and setuptools builds like Python: no overflow would be one
    COMMON += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZERS]
# One build of kernels.cpp per instruction set, and but for the last two one of kernels_train.cpp; at run time
# csrc/cpu/instruction_sets.cpp says which of them can be used.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
INSTRUCTION_SETS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
BF16_SETS = ("avx512_bf16", "amx")


# GPUs that the CUDA library has machine code for, unless TORCH_CUDA_ARCH_LIST says others; and PTX of the newest.
CUDA_ARCHITECTURES = "8.0 8.6 8.9 9.0a 10.0a 12.0+PTX"
CUDA_COMMON = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr"]


REQUIRED = os.environ.get("EFFNET_KERNELS_REQUIRE_NATIVE", "") not in ("", "0")
# A library runs under drivers for its own major version of CUDA and for later ones.
PORTABLE = os.environ.get("EFFNET_KERNELS_PORTABLE", "") not in ("", "0")
INSTALLED = Path("/usr/local")


class NoCudaError(RuntimeError):
    """No CUDA compiler, or no GPU, that the library could be built with or for: no fault of a build."""


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
    command = [nvcc, "--dryrun", *flags, "-c", "-x", "cu", os.devnull]
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


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        for ext in self.extensions:
            self.forget(ext, beside_sources=bool(self.inplace))
        super().run()

    def forget(self, ext: Extension, beside_sources: bool) -> None:
        """Remove the library of an earlier build: from the build folder, and where an editable install has it."""
        name = self.get_ext_filename(ext.name)
        Path(self.build_lib, name).unlink(missing_ok=True)
        if beside_sources:
            Path(name).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        build = self.build_cuda if ext.name.endswith("_cuda") else self.build_cpu
        try:
            build(ext)
        except Exception as error:  # the package works without its compiled backends
            if not isinstance(error, NoCudaError):
                self.forget(ext, beside_sources=not SANITIZED)
                if REQUIRED:
                    raise
            self.warn(f"{ext.name} was not built, its backend will be missing: {error}")

    def build_cpu(self, ext: Extension) -> None:
        torch_compile, torch_link = torch_flags()
        sets = {name: flags for name, flags in INSTRUCTION_SETS.items() if name == "generic" or self.compiles(flags)}
        defines = ["-DEFFNET_X86"] if X86 else []
        defines += [f"-DEFFNET_{name.upper()}" for name in BF16_SETS if name in sets]
        jobs = [
            ("csrc/bindings_cpu.cpp", "bindings", [*COMMON, *torch_compile, *defines]),
            ("csrc/bindings_cpu_train.cpp", "bindings", [*COMMON, *torch_compile, *defines]),
            ("csrc/cpu/instruction_sets.cpp", "common", [*COMMON, *defines]),
            ("csrc/cpu/scratch.cpp", "common", COMMON),
        ]
        if SANITIZED:
            jobs.append(("tests/sanitizers/faults.cpp", "faults", COMMON))
        for name, flags in sets.items():
            files = ["kernels"] if name in BF16_SETS else ["kernels", "kernels_train"]
            jobs += [(f"csrc/cpu/{file}.cpp", name, [*COMMON, *flags]) for file in files]

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            source, name, flags = job
            return self.compiler.compile(
                [source], output_dir=os.path.join(self.build_temp, name), include_dirs=["csrc"], extra_postargs=flags
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [obj for result in pool.map(compile_one, jobs) for obj in result]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[*torch_link, "-lpthread", *SANITIZERS],
            target_lang="c++",
        )

    def compiles(self, flags: list[str]) -> bool:
        """Whether the C++ compiler knows these flags: GCC below 11 does not know AMX, others no x86 at all."""
        command = [*self.compiler.compiler_so, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        return X86 and subprocess.run(command, capture_output=True, check=False).returncode == 0

    def build_cuda(self, ext: Extension) -> None:
        nvcc, version = find_nvcc()
        architectures = asked_architectures()
        if PORTABLE and version >= (13, 0):
            self.warn(f"the wheel will need NVIDIA driver 580 or newer: {nvcc} is of CUDA {version[0]}.{version[1]}")
        includes, runtime = cuda_folders(nvcc, version[0])
        gencode = architecture_flags(architectures)
        torch_compile, torch_link = torch_flags()
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        sources = sorted(Path("csrc/cuda").glob("*.cu"))
        headers = ["-Icsrc", *[f"-I{path}" for path in includes]]

        def compile_one(source: Path) -> str:
            output = folder / f"{source.stem}.o"
            threads = max(1, (os.cpu_count() or 1) // len(sources))
            command = [nvcc, *CUDA_COMMON, *gencode, *headers, f"--threads={threads}", "-c", source, "-o", output]
            result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"nvcc {source}: {result.stderr.strip()[-2000:]}")
            return str(output)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = [pool.submit(compile_one, source) for source in sources]
            system = [word for path in includes for word in ("-isystem", path)]
            defines = [f'-DEFFNET_CUDA_ARCHITECTURES="{" ".join(architectures)}"']
            bindings = self.compiler.compile(
                [str(path) for path in sorted(Path("csrc").glob("bindings_cuda*.cpp"))],
                output_dir=str(folder),
                include_dirs=["csrc"],
                extra_postargs=[*COMMON, *torch_compile, *system, *defines],
            )
            objects = [*bindings, *(kernel.result() for kernel in kernels)]
        # The static runtime: torch's may be of another CUDA version, or not be there.
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[str(runtime), *torch_link, "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"],
            target_lang="c++",
        )

    def copy_extensions_to_source(self) -> None:
        # Editable installs copy what was built; a library that was not built is not there to copy.
        built = Path(self.build_lib)
        self.extensions = [ext for ext in self.extensions if (built / self.get_ext_filename(ext.name)).exists()]
        super().copy_extensions_to_source()


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(f"effnet_kernels._native_{backend}", sources=[])
            for backend in (("cpu",) if SANITIZED else ("cpu", "cuda"))
        ],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    )
