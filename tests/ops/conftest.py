"""Every backend that can run here, as a fixture; poisoned output buffers; one problem shared by all backends."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from effnet_kernels import native
from effnet_kernels.dispatch import backends
from tests.ops.cases import Case
from tests.ops.inputs import Problem, build
from tests.processor import NATIVE

# One entry per build of the kernels that runs here: (id, backend, instruction set). Triton and CUDA have their own,
# smaller grids in tests/triton and tests/cuda: their tensors may be on a GPU, and on the CPU they are a thousand times
# slower.
VARIANTS = [
    (name if name != "cpu" else f"cpu-{isa}", name, isa)
    for name, (available, _) in backends().items()
    if available and name not in ("mixed", "triton", "cuda")
    for isa in (NATIVE if name == "cpu" else ("",))
]


@pytest.fixture(params=VARIANTS, ids=[variant[0] for variant in VARIANTS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an available backend; the cpu backend comes once per instruction set of this machine."""
    _, name, isa = request.param
    if not isa:
        yield name
        return
    native.set_instruction_set(isa)
    try:
        yield name
    finally:
        native.set_instruction_set("auto")


NAMES = list(dict.fromkeys(variant[1] for variant in VARIANTS))


@pytest.fixture(params=NAMES)
def backend_name(request: pytest.FixtureRequest) -> str:
    """The name of an available backend, once each: for what does not depend on the instruction set."""
    return request.param


@pytest.fixture
def cpu_backend(backend: str) -> str:
    if backend != "cpu":
        pytest.skip("a promise of the native CPU backend")
    return backend


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


@functools.lru_cache(maxsize=16)
def _problem(case: Case, dtype: torch.dtype, gate_only: bool) -> Problem:
    return build(case, dtype, gate_only)


@pytest.fixture
def problem() -> Callable[..., Problem]:
    """``build``, remembering the last few problems: their exact results serve every backend in turn."""

    def get(case: Case, dtype: torch.dtype, gate_only: bool = False) -> Problem:
        return _problem(case, dtype, gate_only)

    return get
