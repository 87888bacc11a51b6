"""The ops inside the networks' blocks, each on the maps it meets there."""

from typing import Any

import pytest

from benchmarks import conftest, shapes
from benchmarks.cases import Case, op_case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    cases = []
    for model in conftest.models(config):
        found = shapes.ops(model, config.getoption("--size"))
        for op in shapes.largest(found, config.getoption("--limit") or None):
            for batch in conftest.batches(config, "1", "128"):
                for dtype in conftest.dtypes(config):
                    cases.append(op_case(model, op, found[op], batch, dtype, conftest.DEVICE))
    metafunc.parametrize("case", cases, ids=lambda case: case.title)


@pytest.mark.benchmark(timer=conftest.CLOCK)
def test_op(benchmark: Any, suite: conftest.Suite, case: Case, contender: str) -> None:
    suite.run(benchmark, contender, case)
