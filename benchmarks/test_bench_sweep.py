"""Whole networks over batch sizes, and over resolutions one image at a time; the layout that stock is fastest in, other
runtimes, and the backend of ours that ``auto`` takes."""

from typing import Any

import pytest

from benchmarks import conftest, shapes
from benchmarks.cases import Case, sweep_case
from effnet_kernels.benchmarking import contenders

BATCHES = "1,2,4,8,16,32"
SIZES = (128, 160, 192, 224, 256, 288, 320, 352, 384)


def names() -> list[str]:
    """The contenders; of our backends only the first."""
    found = contenders.contender_names(conftest.DEVICE, compiled=False)
    ours = [name for name in found if name.startswith(contenders.OURS)]
    return [name for name in found if name != contenders.STOCK and name not in ours[1:]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config, points = metafunc.config, {}
    for model in conftest.models(config):
        size = config.getoption("--size") or shapes.MODELS[model]
        over_batches = [(size, batch) for batch in conftest.batches(config, BATCHES, BATCHES)]
        over_sizes = [] if config.getoption("--size") else [(other, 1) for other in SIZES]
        for dtype in conftest.dtypes(config):
            points |= dict.fromkeys((model, *point, dtype) for point in over_batches + over_sizes)
    cases = [sweep_case(*point, conftest.DEVICE) for point in points]
    metafunc.parametrize("swept", names())
    metafunc.parametrize("case", cases, ids=lambda case: case.title)


@pytest.mark.benchmark(timer=conftest.CLOCK)
def test_sweep(benchmark: Any, suite: conftest.Suite, case: Case, swept: str) -> None:
    suite.run(benchmark, swept, case, names())
