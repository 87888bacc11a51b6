"""CUDA's compilers: which is found, what is wrong with one, and what a library is built for."""

import os
import re
import shutil
import sysconfig
from pathlib import Path

import pytest

from csrc import toolchain
from effnet_kernels import native
from tests.conftest import cuda_fault
from tests.source_tree import needs_the_library, tree
from tests.thinning import daily

__all__ = ["tree"]

pytestmark = needs_the_library


@pytest.mark.parametrize("required", daily([True, False], [True]))
@pytest.mark.parametrize(
    "fault",
    daily(
        [{"compile": "echo planted >&2; exit 1"}, {"version": "exit 1"}, {"version": "echo nothing"}],
        [{"compile": "echo planted >&2; exit 1"}],
    ),
)
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
