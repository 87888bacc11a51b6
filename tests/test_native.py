"""Loading the native library, and choosing its instruction set."""

import contextlib
import os
import re
import subprocess
import sys

import pytest
import torch

from effnet_kernels import native


@pytest.fixture
def library():
    available, reason = native.cpu_available()
    if not available:
        pytest.skip(reason)
    yield
    native.set_instruction_set("auto")


@pytest.fixture
def uncached():
    native.cpu_available.cache_clear()
    yield
    native.cpu_available.cache_clear()


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_missing_library_has_a_reason(monkeypatch, tmp_path, uncached):
    monkeypatch.setattr(native, "_CPU_LIBRARY", tmp_path / "_native_cpu.so")
    available, reason = native.cpu_available()
    assert not available
    assert "_native_cpu.so was not built: no C++ compiler" in reason


def test_a_library_that_does_not_load_has_a_reason(monkeypatch, tmp_path, uncached):
    broken = tmp_path / "_native_cpu.so"
    broken.write_bytes(b"not a shared object")
    monkeypatch.setattr(native, "_CPU_LIBRARY", broken)
    available, reason = native.cpu_available()
    assert not available
    assert "_native_cpu.so does not load: " in reason


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match=r"instruction set must be one of \('auto', .*\), got 'avx9'"):
        native.set_instruction_set("avx9")


def test_every_instruction_set_is_taken_or_refused(library):
    refused = r"instruction set '\w+' cannot run on this machine: the (processor|compiler|operating system) "
    taken = []
    for name in native.INSTRUCTION_SETS[1:]:
        with contextlib.suppress(ValueError):
            native.set_instruction_set(name)
            taken.append(name)
        if name in taken:
            assert native.instruction_set() == name
        else:
            with pytest.raises(ValueError, match=refused):
                native.set_instruction_set(name)
    assert "generic" in taken
    native.set_instruction_set("auto")
    assert native.instruction_set() == taken[-1], "auto is the widest"


def test_a_refused_instruction_set_changes_nothing(library):
    native.set_instruction_set("generic")
    with pytest.raises(ValueError, match="must be one of"):
        native.set_instruction_set("avx9")
    assert native.instruction_set() == "generic"
    for code in (99, -1):
        assert torch.ops.effnet_kernels_cpu.set_instruction_set(code) == "there is no such instruction set"
    assert native.instruction_set() == "generic"


def test_the_environment_chooses_the_instruction_set(library):
    code = "from effnet_kernels import native; print(native.cpu_available(), native.instruction_set())"
    assert run_python(code, EFFNET_KERNELS_CPU_ISA="generic") == "(True, 'native C++, generic') generic"


def test_the_environment_cannot_choose_what_the_machine_lacks(library):
    for name in native.INSTRUCTION_SETS[1:]:
        code = "from effnet_kernels import native; native.cpu_available()"
        try:
            native.set_instruction_set(name)
        except ValueError as refusal:
            with pytest.raises(AssertionError, match=f"ValueError: {re.escape(str(refusal))}"):
                run_python(code, EFFNET_KERNELS_CPU_ISA=name)
        else:
            run_python(code, EFFNET_KERNELS_CPU_ISA=name)


def test_the_library_loads_in_a_fresh_process(library):
    code = (
        "import torch; from effnet_kernels import native; torch.ops.load_library(native._CPU_LIBRARY);"
        "print(torch.ops.effnet_kernels_cpu.mbconv.default._schema.name)"
    )
    assert run_python(code) == "effnet_kernels_cpu::mbconv"


def test_the_package_works_without_the_library():
    """On a machine with no compiler: the reference serves, and the reason is told."""
    code = (
        "from pathlib import Path; from effnet_kernels import native; native._CPU_LIBRARY = Path('/nowhere/cpu.so');"
        "import torch, effnet_kernels.functional as F; from effnet_kernels.backends import backends;"
        "one = torch.ones(3); x = torch.ones(1, 3, 4, 4);"
        "y = F.pointwise_conv_bn_act(x, torch.ones(3, 3, 1, 1), F.BatchNorm(one, one, one, one));"
        "print(tuple(y.shape), backends()['cpu'][0])"
    )
    assert run_python(code) == "(1, 3, 4, 4) False"
