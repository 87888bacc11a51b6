"""Training steps of ops, blocks and whole networks: time, and memory for backward."""

from typing import Any

import pytest

from benchmarks import conftest, shapes, training_step
from benchmarks.cases import Case, training_case


def cases(config: pytest.Config) -> list[Case]:
    """Ops and blocks that move the most bytes, and the network itself; each at every dtype asked for."""
    limit = config.getoption("--limit") or None
    found: list[Case] = []
    for model in conftest.models(config):
        size = config.getoption("--size") or shapes.MODELS[model]
        ops = [op for op in shapes.largest(shapes.ops(model, size), limit) if op.kind in ("depthwise", "pointwise")]
        for what in (*ops, *shapes.largest(shapes.blocks(model, size), limit), size):
            for batch in conftest.batches(config, "8", "128"):
                found += [
                    training_case(model, what, batch, dtype, conftest.DEVICE) for dtype in conftest.dtypes(config)
                ]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    names = training_step.contender_names(conftest.DEVICE, compiled=not config.getoption("--no-compile"))
    metafunc.parametrize("trained", names)
    metafunc.parametrize("case", cases(config), ids=lambda case: case.title)


@pytest.mark.benchmark(timer=conftest.CLOCK)
def test_training(benchmark: Any, suite: conftest.Suite, case: Case, trained: str) -> None:
    suite.run(benchmark, trained, case)
