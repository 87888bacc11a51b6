"""Builds the native libraries. Everything else about the package is in pyproject.toml.

They use PyTorch's stable ABI, so one library serves every torch >= 2.11 and every Python, and the wheel is
tagged accordingly. A missing compiler or missing headers cost the backend, never the package.
"""

import os
import platform
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
# One build of kernels.cpp and kernels_train.cpp per instruction set; bindings_cpu.cpp chooses among them at run time.
INSTRUCTION_SETS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
}


def torch_flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags for the stable ABI of torch 2.11."""
    import torch

    root = Path(torch.__file__).parent
    compile_flags = ["-isystem", str(root / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    # torch is loaded first, always: no run path is needed.
    return compile_flags, [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_cpu(ext)
        except Exception as error:  # the package works without its compiled backends
            self.warn(f"{ext.name} was not built, its backend will be missing: {error}")

    def build_cpu(self, ext: Extension) -> None:
        torch_compile, torch_link = torch_flags()
        x86 = ["-DEFFNET_X86"] if X86 else []
        jobs = [
            ("csrc/bindings_cpu.cpp", "bindings", [*COMMON, *torch_compile, *x86]),
            ("csrc/bindings_cpu_train.cpp", "bindings", [*COMMON, *torch_compile, *x86]),
            ("csrc/cpu/scratch.cpp", "scratch", COMMON),
        ]
        for name, flags in INSTRUCTION_SETS.items():
            if X86 or name == "generic":
                for source in ("csrc/cpu/kernels.cpp", "csrc/cpu/kernels_train.cpp"):
                    jobs.append((source, name, [*COMMON, *flags]))

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            source, name, flags = job
            return self.compiler.compile(
                [source], output_dir=os.path.join(self.build_temp, name), include_dirs=["csrc"], extra_postargs=flags
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [obj for result in pool.map(compile_one, jobs) for obj in result]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=torch_link, target_lang="c++"
        )

    def copy_extensions_to_source(self) -> None:
        # Editable installs copy what was built; a library that was not built is not there to copy.
        self.extensions = [ext for ext in self.extensions if os.path.exists(self.get_ext_fullpath_built(ext))]
        super().copy_extensions_to_source()

    def get_ext_fullpath_built(self, ext: Extension) -> str:
        return os.path.join(self.build_lib, self.get_ext_filename(ext.name))


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("effnet_kernels._native_cpu", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
