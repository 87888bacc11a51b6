"""Loading the native libraries, choosing an instruction set, and telling which GPUs there is code for."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csrc import toolchain
from effnet_kernels import native
from effnet_kernels.dispatch import Query
from effnet_kernels.ops import native_cuda


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
    for name in native.instruction_sets():
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


def test_what_an_instruction_set_needs_is_what_the_processor_is_asked_for(library):
    """The library asks by cpuid and XGETBV; Linux says the same in its own words."""
    assert [*native.instruction_sets()] == toolchain.known_sets()
    for name in native.instruction_sets():
        lacking = toolchain.lacks(name)
        if lacking:
            with pytest.raises(ValueError, match=rf"the processor lacks ({'|'.join(lacking)})$"):
                native.set_instruction_set(name)
        else:
            with contextlib.suppress(ValueError) if name == "amx" else contextlib.nullcontext():  # it may be forbidden
                native.set_instruction_set(name)


def test_each_feature_that_an_instruction_set_needs_can_be_asked_for():
    """One that the library does not know would look like one that no processor has."""
    text = (Path(toolchain.__file__).parent / "cpu" / "instruction_sets.cpp").read_text()
    known = re.findall(r'\{"([\w-]+)", \d', text)
    assert {feature for needed in toolchain.INSTRUCTION_SETS.values() for feature in needed} == {*known}


def test_a_refused_instruction_set_changes_nothing(library):
    native.set_instruction_set("generic")
    with pytest.raises(ValueError, match="must be one of"):
        native.set_instruction_set("avx9")
    assert native.instruction_set() == "generic"
    for index in (99, -2):
        assert torch.ops.effnet_kernels_cpu.set_instruction_set(index) == "there is no such instruction set"
    assert native.instruction_set() == "generic"


def test_the_environment_chooses_the_instruction_set(library):
    code = "from effnet_kernels import native; print(native.cpu_available(), native.instruction_set())"
    assert run_python(code, EFFNET_KERNELS_CPU_ISA="generic") == "(True, 'native C++, generic') generic"


def test_the_environment_cannot_choose_what_the_machine_lacks(library):
    name = native.instruction_sets()[-1]
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
        "import torch, effnet_kernels.functional as F; from effnet_kernels.dispatch import backends;"
        "one = torch.ones(3); x = torch.ones(1, 3, 4, 4);"
        "y = F.pointwise_conv_bn_act(x, torch.ones(3, 3, 1, 1), F.BatchNorm(one, one, one, one));"
        "print(tuple(y.shape), backends()['cpu'][0])"
    )
    assert run_python(code) == "(1, 3, 4, 4) False"


@pytest.mark.parametrize(
    ("built_for", "driver", "served", "refused"),
    [
        ("8.0", 13000, [(8, 0), (8, 6), (8, 9)], [(7, 5), (8, 7), (9, 0), (10, 0)]),
        ("8.7", 13000, [(8, 7)], [(8, 6), (8, 9)]),
        ("8.6", 13000, [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("9.0a", 13000, [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        ("10.0f", 13000, [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("8.0+PTX", 13000, [(8, 0), (8, 9), (9, 0), (12, 1)], [(7, 5)]),
        ("8.0+PTX", 13010, [(9, 0)], []),
        ("8.0+PTX", 12090, [(8, 0), (8, 9)], [(9, 0), (12, 1)]),  # an older driver compiles no newer PTX
        ("9.0a+PTX", 13000, [(9, 0)], [(9, 1), (10, 0)]),
        ("10.0f+PTX", 13000, [(10, 3)], [(9, 0), (12, 0)]),
        (
            "8.0 8.6 8.9 9.0a 10.0a 12.0+PTX",
            13000,
            [(8, 9), (9, 0), (10, 0), (12, 1), (13, 0)],
            [(7, 0), (8, 7), (10, 3)],
        ),
    ],
)
def test_which_gpus_there_is_code_for(built_for, driver, served, refused):
    assert all(native.has_code(gpu, built_for, 13000, driver) for gpu in served)
    assert not any(native.has_code(gpu, built_for, 13000, driver) for gpu in refused)


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Sets what GPUs (by their capabilities), CUDA library and driver there are; what this machine has is not seen."""

    def forget():
        native._cuda_library.cache_clear()
        native._serves.cache_clear()

    def install(capabilities, built_for="8.0 9.0a", toolkit=13000, driver=13000):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        monkeypatch.setattr(native, "_cuda_build", lambda: (built_for, toolkit, driver))
        forget()

    (tmp_path / "_native_cuda.so").touch()
    monkeypatch.setattr(native, "_CUDA_LIBRARY", tmp_path / "_native_cuda.so")
    for module in (native, native_cuda):
        monkeypatch.setattr(module, "cuda_emulated", lambda: False)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    yield install
    forget()


def test_a_gpu_without_code_costs_no_other_one_its_backend(gpus, monkeypatch):
    gpus([(7, 0), (9, 0)])
    assert native.cuda_available() == (True, "CUDA C++, built with CUDA 13.0 for 8.0 9.0a")
    problem = Query("mbconv", "cuda:1", torch.float16, (3, 3))
    assert native_cuda.supports(problem) == (True, "any shape")
    missing = "_native_cuda.so has no code for GPU 0, compute capability 7.0: it was built for 8.0 9.0a"
    assert native_cuda.supports(problem._replace(device="cuda:0")) == (False, missing)
    assert native_cuda.supports(problem._replace(device="cuda")) == (True, "any shape")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert native_cuda.supports(problem._replace(device="cuda")) == (False, missing)
    assert native_cuda.supports(problem._replace(device="cpu")) == (False, "the tensors are on cpu")
    gpus([(7, 0), (12, 0)], built_for="8.0 9.0a+PTX")
    available, reason = native.cuda_available()
    assert not available
    assert re.fullmatch(r".* GPU 0, compute capability 7\.0: .*; .* GPU 1, compute capability 12\.0: .*", reason)


@pytest.mark.parametrize(
    ("toolkit", "driver", "needed"),
    [
        (13000, 12080, "CUDA 13.0, which needs NVIDIA driver 580 or newer; this one is for CUDA 12.8"),
        (12080, 11080, "CUDA 12.8, which needs NVIDIA driver 525 or newer; this one is for CUDA 11.8"),
        (14010, 13020, "CUDA 14.1, which needs a newer NVIDIA driver; this one is for CUDA 13.2"),
    ],
)
def test_a_driver_that_is_too_old(gpus, toolkit, driver, needed):
    gpus([(9, 0)], toolkit=toolkit, driver=driver)
    assert native.cuda_available() == (False, f"_native_cuda.so was built with {needed}")


def test_an_older_driver_of_the_same_major_version(gpus):
    gpus([(9, 0), (12, 0)], built_for="8.0+PTX 9.0a", toolkit=12080, driver=12040)
    assert native.cuda_available() == (True, "CUDA C++, built with CUDA 12.8 for 8.0+PTX 9.0a")
    served, reason = native.cuda_serves("cuda:1")
    assert not served
    assert reason.endswith("for 8.0+PTX 9.0a, and a driver for CUDA 12.4 compiles no PTX of CUDA 12.8")
