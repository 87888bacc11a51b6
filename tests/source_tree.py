"""A copy of the sources to build in, with stand-ins for the compilers."""

import filecmp
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from effnet_kernels import native

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    "setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "constraints-latest.txt", "README.md",
    "CHANGELOG.md",
]  # fmt: skip
PLANTED = 'static int planted = "no number";\n'
LIBRARIES = ("_native_cpu.so", "_native_cuda.so")

# Stand for a compiler that finds no fault, says what a file includes if HEADERS is set, and links to this package's CPU
# library; and for nvcc.
COMPILER = """#!/bin/sh
echo "$@" >> "$0.log"
[ -z "$HEADERS" ] || case "$*" in *" -c "*) g++ "$@" -MM 2>/dev/null;; esac
while [ $# -gt 1 ]; do
  case "$1" in *.cpp) [ -e "$1" ] || exit 1;; esac
  case "$1 $2" in
  "-o "*.so) cp {library} "$2";;
  "-o "*) echo object > "$2";;
  esac
  shift
done
"""
NVCC = """#!/bin/sh
case "$*" in
*--version*) {version};;
*--dryrun*) echo '#$ TOP={toolkit}' >&2;;
*) {compile};;
esac
"""


class Tree:
    """A copy of the sources, with libraries of an earlier build in it, and an environment.

    That sees the packages of this one, but has no CUDA compiler in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "tree"
        self.bin = root / "bin"
        self.bin.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.root / ".venv"], check=True)
        self.python = self.root / ".venv" / "bin" / "python"
        packages = sysconfig.get_path("purelib", vars={"base": str(self.root / ".venv")})
        Path(packages, "outer.pth").write_text(sysconfig.get_path("purelib"))
        without = shutil.ignore_patterns("*.so", "__pycache__")
        for folder in ("csrc", "effnet_kernels"):
            shutil.copytree(ROOT / folder, self.root / folder, ignore=without)
        for name in FILES:
            shutil.copy(ROOT / name, self.root)
        self.built = self.root / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        (self.built / "effnet_kernels").mkdir(parents=True)
        for name in LIBRARIES:
            (self.built / "effnet_kernels" / name).write_text("stale\n")
            (self.root / "effnet_kernels" / name).write_text("stale\n")
        self.environment = os.environ | {"TORCH_CUDA_ARCH_LIST": "9.0a"}
        tools = Path(sys.executable).parent  # with ninja
        self.environment["PATH"] = f"{self.bin}:{os.environ['PATH']}:{tools}"
        for name in ("CUDA_HOME", "CUDA_PATH", "MAKEFLAGS", "PYTEST_ARGS", "EFFNET_KERNELS_REQUIRE_NATIVE"):
            self.environment.pop(name, None)
        self.nvcc(version="echo release 11.8")

    def script(self, name: str, text: str) -> str:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def nvcc(self, version: str = "echo release 13.0", compile: str = 'exec faultless "$@"') -> None:
        """What ``nvcc`` on PATH does when it is asked for its version, and to compile."""
        toolkit = self.bin / "toolkit"
        (toolkit / "lib64").mkdir(parents=True, exist_ok=True)
        (toolkit / "lib64" / "libcudart_static.a").touch()
        self.script("nvcc", NVCC.format(version=version, compile=compile, toolkit=toolkit))

    def faultless(self, library: Path = native._CPU_LIBRARY) -> None:
        """From here on the C++ compiler takes everything, at once, and makes this library of it."""
        compiler = self.script("faultless", COMPILER.format(library=library))
        self.environment = self.environment | {"CXX": compiler}

    def plant(self, file: str) -> None:
        source = self.root / "csrc" / file
        source.write_text(PLANTED + source.read_text())

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.root, env=self.environment | environment, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def build(self, required: bool) -> subprocess.CompletedProcess[str]:
        """As an editable install does it."""
        command = (str(self.python), "setup.py", "-q", "build_ext", "--inplace")
        return self.run(*command, EFFNET_KERNELS_REQUIRE_NATIVE=str(int(required)))

    def compiled(self) -> set[str]:
        """What a build compiles and links."""
        log = self.bin / "faultless.log"
        log.unlink(missing_ok=True)
        result = self.build(required=True)
        assert result.returncode == 0, result.stdout
        return set(re.findall(r" -o (\S+)", log.read_text())) if log.exists() else set()

    def wheel(self) -> list[str]:
        """The libraries in a wheel."""
        result = self.run(str(self.python), "setup.py", "-q", "bdist_wheel", "--dist-dir", "dist")
        assert result.returncode == 0, result.stdout
        (path,) = (self.root / "dist").glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".so")]
            assert all(archive.read(name) == native._CPU_LIBRARY.read_bytes() for name in names)
        return sorted(Path(name).name for name in names)

    def libraries(self) -> list[str]:
        """Those beside the sources, all of this build."""
        paths = sorted((self.root / "effnet_kernels").glob("*.so"))
        assert all(filecmp.cmp(path, native._CPU_LIBRARY, shallow=False) for path in paths)
        return [path.name for path in paths]


needs_the_library = pytest.mark.skipif(not native._CPU_LIBRARY.exists(), reason="the CPU library is not built")


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)
