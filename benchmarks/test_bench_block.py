"""The networks' blocks, each with its own weights on the map it meets there."""

from typing import Any

import pytest

from benchmarks import conftest, shapes
from benchmarks.cases import Case, block_case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    cases = []
    for model in conftest.models(config):
        found = shapes.blocks(model, config.getoption("--size"))
        for block in shapes.largest(found, config.getoption("--limit") or None):
            for batch in conftest.batches(config, "1", "128"):
                for dtype in conftest.dtypes(config):
                    cases.append(block_case(model, block, found[block], batch, dtype, conftest.DEVICE))
    metafunc.parametrize("case", cases, ids=lambda case: case.title)


@pytest.mark.benchmark(timer=conftest.CLOCK)
def test_block(benchmark: Any, suite: conftest.Suite, case: Case, contender: str) -> None:
    suite.run(benchmark, contender, case)
