"""Builds the native libraries, as csrc/build.py says. Everything else about the package is in pyproject.toml.

They use PyTorch's stable ABI, so one library serves every torch >= 2.11 and every Python, and the wheel is
tagged accordingly. For `pip install` a library that cannot be built costs its backend, never the package; for
`make`, which sets EFFNET_KERNELS_REQUIRE_NATIVE, it is an error. A library of an earlier build never outlives a build.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))
from csrc.build import ship


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def run(self) -> None:
        """Into the build folder, from where a wheel takes them, or for an editable install beside the sources."""
        package = Path(__file__).resolve().parent / "effnet_kernels"
        built = ship(package if self.inplace else Path(self.build_lib, "effnet_kernels"))
        self.extensions = [extension for extension in self.extensions if extension.name.rpartition("_")[2] in built]


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"effnet_kernels._native_{backend}", sources=[]) for backend in ("cpu", "cuda")],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
