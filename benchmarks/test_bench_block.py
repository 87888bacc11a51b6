"""The networks' blocks, each with its own weights on the map it meets there."""

from typing import Any

import pytest
import torch

from benchmarks import conftest, shapes
from effnet_kernels.benchmarking.models import create_model


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    cases = []
    for model in conftest.models(config):
        found = shapes.blocks(model, config.getoption("--size"))
        for block in shapes.largest(found, config.getoption("--limit") or None):
            for batch in conftest.batches(config, "1", "128"):
                cases += [(model, block, found[block], batch, dtype) for dtype in conftest.dtypes(config)]
    metafunc.parametrize("case", cases, ids=lambda case: f"{case[0]} {case[1].path} batch {case[3]} {case[4]}")


@pytest.mark.benchmark(timer=conftest.CLOCK)
def test_block(benchmark: Any, suite: conftest.Suite, case: tuple, contender: str) -> None:
    model, block, count, batch, dtype_name = case
    dtype = conftest.DTYPES[dtype_name]

    def make() -> tuple[torch.nn.Module, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, block.channels[0], block.size, block.size, generator=generator)
        stock = create_model(model).get_submodule(block.path)
        return stock.to(conftest.DEVICE, dtype), x.to(conftest.DEVICE, dtype)

    suite.run(
        benchmark,
        contender,
        level="block",
        case=f"{model} {block.path} {block}, batch {batch}, {dtype_name}",
        make=make,
        batch=batch,
        bytes_=block.bytes(batch, dtype.itemsize),
        count=count,
    )
