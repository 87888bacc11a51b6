"""Fixtures shared by the tests of modules and patching; Triton's interpreter, or a GPU made ready for tests.

``EFFNET_KERNELS_REQUIRE_NATIVE=1``, as in ``make test``, makes a missing native library an error: without it the tests
of that library are skipped.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if torch.cuda.is_available():
    # Without it torch refuses matrix products under deterministic algorithms, which `poison` turns on.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Stock layers in float32 are what results are compared with: they have to compute in float32.
    torch.backends.cudnn.allow_tf32 = False
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from effnet_kernels import native
from effnet_kernels.benchmarking.environment import cpu_model, versions
from tests.models import BACKENDS
from tests.processor import EMULATED, NATIVE

# The same examples on every run; a machine may be slow, and fixtures may serve all examples of a test.
settings.register_profile("exhaustive", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.register_profile("tests", settings.get_profile("exhaustive"), max_examples=15)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="also what is marked exhaustive, as make test-all does")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("exhaustive"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("exhaustive")])
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("exhaustive" if config.getoption("exhaustive") else "tests")
    if os.environ.get("EFFNET_KERNELS_REQUIRE_NATIVE", "") in ("", "0") or hasattr(config, "workerinput"):
        return
    available, reason = native.cpu_available()
    if not available:
        raise pytest.UsageError(f"the CPU library is required: {reason}")
    fault = cuda_fault()
    if fault is not None:
        raise pytest.UsageError(f"the CUDA library is required: {fault}")


def cuda_fault() -> str | None:
    """What is wrong with the CUDA library, GPU or not; nothing is if it is missing where there is no nvcc."""
    if native._CUDA_LIBRARY.exists():  # in a process of its own: here the emulation may register the same ops
        code = "import sys, torch; torch.ops.load_library(sys.argv[1])"
        command = [sys.executable, "-c", code, str(native._CUDA_LIBRARY)]
        loaded = subprocess.run(command, capture_output=True, text=True, check=False)
        return None if loaded.returncode == 0 else loaded.stderr.strip().splitlines()[-1]
    from csrc.toolchain import NoCudaError, asked_architectures, find_nvcc

    try:
        (nvcc, _), _ = find_nvcc(), asked_architectures()
    except NoCudaError:
        return None
    return f"there is {nvcc}, but the library was not built (see `make build`)"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Last of all: what the tests ran on."""
    yield
    there = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    natively, emulated = (", ".join(sets) or "none" for sets in (NATIVE, EMULATED))
    terminalreporter.write_line(f"processor: {cpu_model()}")
    terminalreporter.write_line(f"instruction sets of the CPU kernels: {natively} natively; {emulated} emulated")
    terminalreporter.write_line(f"versions: {there}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here, in turn."""
    return request.param


def pytest_runtest_logfinish(nodeid: str) -> None:
    """A kernel's failure comes to light at the next synchronisation, and ends all use of the GPU in its process."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # blamed on this test; another worker goes on with the next one
        pytest.exit(f"the GPU cannot be used any more after {nodeid}: {error}", 1)
