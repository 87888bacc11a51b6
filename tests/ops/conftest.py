"""Every build of the CPU kernels as a fixture; poisoned output buffers; one problem shared by all builds."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from effnet_kernels import native
from tests.models import BACKENDS
from tests.ops.cases import Case
from tests.ops.inputs import Problem, build
from tests.processor import NATIVE


@pytest.fixture(params=NATIVE, ids=lambda isa: f"cpu-{isa}")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend of the CPU kernels, once per instruction set that this processor runs.

    The reference is judged in test_oracle.py. Triton and CUDA have grids of their own in tests/triton and tests/cuda:
    their tensors may be on a GPU, and on the CPU they are a thousand times slower.
    """
    native.set_instruction_set(request.param)
    yield "cpu"
    native.set_instruction_set("auto")


@pytest.fixture(params=BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    """The reference, and the CPU kernels once: for what does not depend on the instruction set."""
    return request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill every fresh tensor, outputs and scratch alike, with NaN: an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty_strided((2, 2), (2, 1)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def problem() -> Callable[[Case, torch.dtype], Problem]:
    """``build``, remembering the last few problems: their exact results serve every build in turn."""
    return functools.lru_cache(maxsize=16)(build)
