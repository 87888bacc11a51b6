"""A library that does not build is an error for ``make``, and costs ``pip install`` its backend. None is left over."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from csrc import build
from tests.source_tree import LIBRARIES, ROOT, needs_the_library, tree
from tests.thinning import daily

__all__ = ["tree"]

pytestmark = needs_the_library


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
def test_both_libraries_are_built_anew(tree, required):
    tree.faultless()
    tree.nvcc()
    result = tree.build(required)
    assert result.returncode == 0, result.stdout
    assert tree.libraries() == [*LIBRARIES]


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


def test_a_compiler_with_a_launcher_and_flags_in_a_folder_with_a_space(tree):
    tree.faultless()
    folder = tree.root / "a folder"
    folder.mkdir()
    (tree.bin / "faultless").rename(folder / "faultless")
    tree.environment |= {"CXX": f"env '{folder / 'faultless'}' -pipe", "CXXFLAGS": "-DPACKAGER=1", "LDFLAGS": "-Wl,-O1"}
    (tree.root / "csrc" / "cpu" / ".#simd.h").symlink_to("nowhere")  # an editor's lock
    result = tree.build(required=True)
    assert result.returncode == 0, result.stdout
    assert tree.libraries() == ["_native_cpu.so"]
    commands = (folder / "faultless.log").read_text().splitlines()
    compiled = [command for command in commands if " -c " in command]
    assert compiled
    assert all(command.startswith("-pipe -DPACKAGER=1 ") for command in compiled)
    assert any(command.startswith("-pipe -Wl,-O1 -shared") for command in commands)


def test_without_ninja_an_install_has_no_library_and_tests_can_be_collected(tree):
    (tree.root / "ninja.py").write_text("raise ImportError('planted')\n")
    tree.environment["PYTHONPATH"] = str(tree.root)
    result = tree.build(required=False)
    assert result.returncode == 0, result.stdout
    assert "_native_cpu.so was not built, its backend will be missing: planted" in result.stdout
    assert tree.build(required=True).returncode != 0
    code = "import csrc.build, csrc.toolchain"
    assert tree.run(str(tree.python), "-c", code).returncode == 0


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
