"""The ops inside the networks' blocks, each on the maps it meets there."""

from typing import Any

import pytest
import torch

from benchmarks import conftest, shapes
from benchmarks.stock import OurOp, stock_op


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    cases = []
    for model in conftest.models(config):
        found = shapes.ops(model, config.getoption("--size"))
        for op in shapes.largest(found, config.getoption("--limit") or None):
            for batch in conftest.batches(config, "1", "128"):
                cases += [(model, op, found[op], batch, dtype) for dtype in conftest.dtypes(config)]
    metafunc.parametrize("case", cases, ids=lambda case: f"{case[0]} {case[1]} batch {case[3]} {case[4]}")


@pytest.mark.benchmark(timer=conftest.CLOCK)
def test_op(benchmark: Any, suite: conftest.Suite, case: tuple, contender: str) -> None:
    model, op, count, batch, dtype_name = case
    dtype = conftest.DTYPES[dtype_name]

    def make() -> tuple[torch.nn.Module, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, op.channels[0], op.size, op.size, generator=generator)
        return stock_op(op).to(conftest.DEVICE, dtype), x.to(conftest.DEVICE, dtype)

    suite.run(
        benchmark,
        contender,
        level="op",
        case=f"{model} {op}, batch {batch}, {dtype_name}",
        make=make,
        fused=lambda stock, backend: OurOp(op, stock, backend),
        batch=batch,
        bytes_=op.bytes(batch, dtype.itemsize),
        count=count,
    )
