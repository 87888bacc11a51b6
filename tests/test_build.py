"""A library that does not build is an error for ``make``, and costs ``pip install`` its backend. None is left over."""

import filecmp
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from csrc import build, toolchain
from effnet_kernels import native
from tests.conftest import cuda_fault
from tests.thinning import daily

pytestmark = pytest.mark.skipif(not native._CPU_LIBRARY.exists(), reason="the CPU library is not built")

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


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.mark.parametrize("file", ["bindings_cpu.cpp", "cpu/common.h"])
def test_an_error_in_cpp_is_an_error_where_the_library_is_required(tree, file):
    tree.plant(file)
    result = tree.build(required=True)
    assert result.returncode != 0
    assert "planted" in result.stdout
    assert tree.libraries() == []


def test_an_error_in_cpp_costs_an_install_its_backend(tree):
    tree.plant("cpu/common.h")
    result = tree.build(required=False)
    assert result.returncode == 0, result.stdout
    assert "_native_cpu.so was not built, its backend will be missing" in result.stdout
    assert tree.libraries() == []


def test_a_wheel_has_the_libraries_of_its_own_build_only(tree):
    tree.faultless()
    assert tree.wheel() == ["_native_cpu.so"]
    shutil.rmtree(tree.root / "dist")
    tree.script("faultless", "#!/bin/sh\nexit 1\n")
    assert tree.wheel() == []
    assert not (tree.root / "effnet_kernels" / "_native_cpu.so").exists()  # it is not of these sources


@pytest.mark.parametrize("required", daily([True, False], [True]))
@pytest.mark.parametrize(
    "fault",
    daily(
        [{"compile": "echo planted >&2; exit 1"}, {"version": "exit 1"}, {"version": "echo nothing"}],
        [{"version": "exit 1"}],
    ),
)
@pytest.mark.exhaustive
def test_an_error_in_cuda(tree, required, fault):
    tree.faultless()
    tree.nvcc(**fault)
    result = tree.build(required)
    assert (result.returncode != 0) == required, result.stdout
    assert "nvcc" in result.stdout
    assert "_native_cuda.so" not in tree.libraries()
    if not required:
        assert tree.libraries() == ["_native_cpu.so"]


@pytest.mark.parametrize("required", daily([True, False], [True]))
@pytest.mark.exhaustive
def test_without_a_cuda_compiler_there_is_nothing_to_require(tree, required):
    """One that is too old counts as none, and so does one that finds no GPU to compile for."""
    tree.faultless()
    result = tree.build(required)
    assert result.returncode == 0, result.stdout
    assert "nvcc is of CUDA 11.8" in result.stdout
    assert tree.libraries() == ["_native_cpu.so"]
    tree.nvcc()
    tree.environment["TORCH_CUDA_ARCH_LIST"] = "7.5"
    result = tree.build(required)
    assert result.returncode == 0, result.stdout
    assert tree.libraries() == ["_native_cpu.so"]


@pytest.mark.parametrize("required", daily([True, False], [True]))
def test_both_libraries_are_built_anew(tree, required):
    tree.faultless()
    tree.nvcc()
    result = tree.build(required)
    assert result.returncode == 0, result.stdout
    assert tree.libraries() == [*LIBRARIES]


def test_the_cuda_library_says_what_it_is_built_for(tree):
    tree.faultless()
    tree.nvcc()
    tree.environment["TORCH_CUDA_ARCH_LIST"] = "7.5 8.0;9.0a+PTX"
    assert tree.build(required=True).returncode == 0
    commands = (tree.bin / "faultless.log").read_text().splitlines()
    kernels = [command for command in commands if ".cu -o" in command]
    bindings = [command for command in commands if "csrc/bindings_cuda" in command and " -c " in command]
    assert kernels
    assert bindings
    for command in kernels:
        assert re.findall(",code=([a-z0-9_]+)", command) == ["sm_80", "sm_90a", "compute_90a"]
    assert all('-DEFFNET_CUDA_ARCHITECTURES="8.0 9.0a+PTX"' in command for command in bindings)


@pytest.fixture
def toolkits(tree, monkeypatch):
    """Installs stand-ins of toolkits; those not on PATH nor in CUDA_HOME are found for a portable wheel only."""

    def install(folder: str, release: str, unknown: str = "none") -> Path:
        nvcc = tree.root / folder / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        (tree.root / folder / "lib64").mkdir()
        (tree.root / folder / "lib64" / "libcudart_static.a").touch()
        says = f"echo '#$ TOP={tree.root / folder}' >&2\necho release {release}"
        nvcc.write_text(f"#!/bin/sh\ncase $* in *compute_{unknown}*) exit 1;; esac\n{says}\n")
        nvcc.chmod(0o755)
        return nvcc

    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tree.root / "wheels"))
    monkeypatch.setattr(os, "environ", tree.environment)
    monkeypatch.setattr(toolchain, "INSTALLED", tree.root)
    monkeypatch.setitem(tree.environment, "TORCH_CUDA_ARCH_LIST", "8.0 12.0+PTX")
    tree.nvcc()
    return install


def test_a_portable_wheel_takes_the_newest_toolkit_for_older_drivers(tree, toolkits, monkeypatch):
    on_path = tree.bin / "nvcc", (13, 0)
    toolkits("cuda-11.8", "11.8")
    toolkits("cuda-12.6", "12.6", unknown="120")
    toolkits("cuda-13.2", "13.2")
    monkeypatch.setattr(toolchain, "PORTABLE", True)
    assert toolchain.find_nvcc() == on_path, "no other one knows all architectures"
    toolkits("cuda-12.8", "12.8")
    newest = toolkits("cuda-12.10", "12.10")
    without_runtime = toolkits("cuda-12.12", "12.12")
    shutil.rmtree(without_runtime.parents[1] / "lib64")
    assert toolchain.find_nvcc() == (newest, (12, 10))
    monkeypatch.setattr(toolchain, "PORTABLE", False)
    assert toolchain.find_nvcc() == on_path, "as it was told"
    monkeypatch.setattr(toolchain, "PORTABLE", True)
    told = toolkits("told", "13.1")
    monkeypatch.setitem(tree.environment, "CUDA_HOME", str(told.parents[1]))
    assert toolchain.find_nvcc() == (told, (13, 1))


@pytest.mark.exhaustive
def test_a_portable_wheel_that_needs_a_new_driver_says_so(tree):
    tree.faultless()
    tree.nvcc()
    tree.environment["CUDA_HOME"] = str(tree.root / "home")
    (tree.root / "home").mkdir()
    (tree.root / "home" / "bin").symlink_to(tree.bin)
    warning = "the wheel will need NVIDIA driver 580 or newer"
    assert warning not in tree.build(required=True).stdout
    tree.environment["EFFNET_KERNELS_PORTABLE"] = "1"
    assert warning in tree.build(required=True).stdout
    tree.nvcc(version="echo release 12.8")
    assert warning not in tree.build(required=True).stdout


def test_the_runtime_is_of_the_compilers_version(tree, monkeypatch):
    """Torch's wheels have the headers and the runtime where the toolkit has none, but for one version of CUDA only."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tree.root))
    runtime = tree.root / "nvidia" / "cu13" / "lib" / "libcudart_static.a"
    runtime.parent.mkdir(parents=True)
    runtime.touch()
    tree.nvcc()
    (tree.bin / "toolkit" / "lib64" / "libcudart_static.a").unlink()
    assert toolchain.cuda_folders(tree.bin / "nvcc", 13)[1] == runtime
    with pytest.raises(RuntimeError, match=r"libcudart_static\.a is in none of"):
        toolchain.cuda_folders(tree.bin / "nvcc", 12)


with_make = pytest.mark.skipif(
    shutil.which("make") is None or not [*importlib.metadata.Distribution.discover(name="pip")],
    reason="make or pip is not installed",
)


@with_make
@pytest.mark.exhaustive
def test_make_has_an_environment_of_its_own_for_the_newest_torch(tree):
    """Made anew when its pins change; the tests in it are there, and run on the libraries of ``make build``."""
    tree.faultless()
    assert tree.run("make", "build").returncode == 0
    planned = tree.run("make", "--dry-run", "test-latest").stdout
    assert re.search(r"build/latest/bin/python -m pip .* --requirement constraints-latest\.txt", planned)
    run = re.search("EFFNET_KERNELS_REQUIRE_NATIVE=1 .*build/latest/bin/python -m pytest(?:.*\\\\\n)*.*", planned)
    assert run
    named = re.findall(r"\btests/\S+", run[0])
    assert "tests/patching" in named
    assert all((ROOT / name).exists() for name in named)
    assert "setup.py" not in planned
    stamp = tree.root / "build" / "latest" / ".requirements"
    stamp.parent.mkdir(parents=True)
    stamp.touch()
    assert "--requirement" not in tree.run("make", "--dry-run", "test-latest").stdout
    os.utime(tree.root / "constraints-latest.txt", (stamp.stat().st_mtime + 1,) * 2)
    assert "--requirement" in tree.run("make", "--dry-run", "test-latest").stdout


@with_make
def test_make_builds_and_an_error_stops_it(tree):
    good = tree.environment
    tree.faultless()
    result = tree.run("make", "build")
    assert result.returncode == 0, result.stdout
    assert tree.libraries() == ["_native_cpu.so"]
    assert re.search("EFFNET_KERNELS_REQUIRE_NATIVE=1 .*pytest", tree.run("make", "--dry-run", "test").stdout)
    assert re.search("EFFNET_KERNELS_PORTABLE=1 .*-m build", tree.run("make", "--dry-run", "wheel").stdout)
    tree.environment = good
    tree.plant("cpu/common.h")
    result = tree.run("make", "test")
    assert result.returncode != 0
    assert "planted" in result.stdout
    assert "==> tests" not in result.stdout
    assert tree.libraries() == []


def test_what_has_changed_is_built_and_nothing_else(tree):
    tree.faultless()
    tree.environment["HEADERS"] = "1"
    everything = tree.compiled()
    assert {"_native_cpu.so", "scratch.o", "bindings_cpu.o", "kernels-generic.o"} < everything
    assert tree.compiled() == set(), "an untouched tree"

    header = tree.root / "csrc" / "cpu" / "train.h"
    os.utime(header)
    changed = tree.compiled()
    assert {"bindings_cpu_train.o", "kernels_train-generic.o", "_native_cpu.so"} < changed
    assert not changed & {"scratch.o", "bindings_cpu.o", "kernels-generic.o"}

    source, library = tree.root / "csrc" / "cpu" / "scratch.cpp", tree.root / "effnet_kernels" / "_native_cpu.so"
    before, times = source.read_text(), source.stat()
    source.write_text(before + "\n")
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert tree.compiled() == {"scratch.o", "_native_cpu.so"}, "other content has come with an older time"
    source.rename(source.with_name("arena.cpp"))
    result = tree.build(required=True)
    assert result.returncode != 0, "a file has another name"
    assert not library.exists()
    source.with_name("arena.cpp").rename(source)
    assert tree.compiled() <= {"scratch.o", "_native_cpu.so"}
    library.unlink()
    assert tree.compiled() == set(), "only the copy beside the sources is gone"
    assert tree.libraries() == ["_native_cpu.so"]
    library.write_text("stale\n")
    assert tree.compiled() == set(), "it is another one"
    assert tree.libraries() == ["_native_cpu.so"]
    tree.script("newer", (tree.bin / "faultless").read_text().replace("$0.log", str(tree.bin / "faultless.log")))
    tree.environment["CXX"] = str(tree.bin / "newer")
    assert tree.compiled() == everything, "another compiler"


def test_another_gpu_is_another_library(tree):
    tree.faultless()
    tree.nvcc()
    assert any(name.endswith("_native_cuda.so") for name in tree.compiled())
    tree.environment["TORCH_CUDA_ARCH_LIST"] = "8.0"
    changed = tree.compiled()
    assert {"stem.o", "_native_cuda.so"} < changed
    assert "_native_cpu.so" not in changed
    assert tree.compiled() == set()
    (tree.bin / "nvcc").write_text((tree.bin / "nvcc").read_text().replace("release 13.0", "release 13.1"))
    assert {"stem.o", "_native_cuda.so"} < tree.compiled(), "its compiler is another version"


def test_a_library_that_does_not_load_is_not_kept(tree):
    (tree.bin / "broken.so").write_text("not a library")
    tree.faultless(tree.bin / "broken.so")
    result = tree.build(required=True)
    assert result.returncode != 0
    assert "Could not load this library" in result.stdout
    assert tree.libraries() == []


@pytest.mark.exhaustive
def test_editors_are_told_how_each_file_is_compiled(tree):
    tree.faultless()
    result = tree.run(str(tree.python), "-m", "csrc.build")
    assert result.returncode == 0, result.stdout
    commands = json.loads((tree.root / "build" / "compile_commands.json").read_text())
    files = {Path(entry["file"]).name for entry in commands}
    assert {"kernels.cpp", "kernels_train.cpp", "bindings_cpu.cpp", "instruction_sets.cpp", "scratch.cpp"} <= files
    assert all("-I" in entry["command"] for entry in commands)


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang")
@pytest.mark.parametrize("isa", daily(build.known_sets(), ["avx2", "amx"]))
def test_clang_takes_the_kernels(isa):
    flags = [
        *build.SHIPPED,
        *build.machine_flags(isa),
        f"-DEFFNET_ISA={isa}",
        "-fsyntax-only",
        "-Wno-unknown-warning-option",
    ]
    for source in ("kernels.cpp", "kernels_train.cpp"):
        command = ["clang++", *flags, str(build.CSRC / "cpu" / source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")


def test_the_tests_do_not_start_without_the_cpu_library(tmp_path):
    (tmp_path / "without.py").write_text(
        "from pathlib import Path; from effnet_kernels import native; native._CPU_LIBRARY = Path('/nowhere/native.so')"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "without", "tests/test_native.py"]
    environment = os.environ | {"EFFNET_KERNELS_REQUIRE_NATIVE": "1", "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, env=environment)
    assert (result.returncode, "the CPU library is required" in result.stderr) == (pytest.ExitCode.USAGE_ERROR, True)


def test_what_is_wrong_with_the_cuda_library(tree, monkeypatch):
    """What keeps the tests from starting."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tree.bin))  # where wheels of CUDA would be
    monkeypatch.setattr(os, "environ", tree.environment)
    monkeypatch.setattr(native, "_CUDA_LIBRARY", tree.bin / "native.so")
    assert cuda_fault() is None, "no nvcc that is new enough"
    tree.nvcc()
    assert "the library was not built" in cuda_fault()
    tree.environment["TORCH_CUDA_ARCH_LIST"] = "7.5"
    assert cuda_fault() is None, "no GPU to build it for"
    (tree.bin / "native.so").write_text("not a library")
    assert "native.so" in cuda_fault()
    monkeypatch.setattr(native, "_CUDA_LIBRARY", native._CPU_LIBRARY)
    assert cuda_fault() is None, "it loads"
