"""Whole networks, one forward pass."""

from typing import Any

import pytest

from benchmarks import conftest, shapes
from benchmarks.cases import Case, model_case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    cases = [
        model_case(model, config.getoption("--size") or shapes.MODELS[model], batch, dtype, conftest.DEVICE)
        for model in conftest.models(config)
        for batch in conftest.batches(config, "1,8", "1,128")
        for dtype in conftest.dtypes(config)
    ]
    metafunc.parametrize("case", cases, ids=lambda case: case.title)


@pytest.mark.benchmark(timer=conftest.CLOCK)
def test_model(benchmark: Any, suite: conftest.Suite, case: Case, contender: str) -> None:
    suite.run(benchmark, contender, case)
