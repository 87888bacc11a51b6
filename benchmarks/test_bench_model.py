"""Whole networks, one forward pass."""

from typing import Any

import pytest
import torch

from benchmarks import conftest, shapes
from effnet_kernels.benchmarking.models import create_model, noise


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    cases = [
        (model, config.getoption("--size") or shapes.MODELS[model], batch, dtype)
        for model in conftest.models(config)
        for batch in conftest.batches(config, "1,8", "1,128")
        for dtype in conftest.dtypes(config)
    ]
    metafunc.parametrize("case", cases, ids=lambda case: f"{case[0]} @{case[1]} batch {case[2]} {case[3]}")


@pytest.mark.benchmark(timer=conftest.CLOCK)
def test_model(benchmark: Any, suite: conftest.Suite, case: tuple, contender: str) -> None:
    model, size, batch, dtype_name = case
    dtype = conftest.DTYPES[dtype_name]

    def make() -> tuple[torch.nn.Module, torch.Tensor]:
        x = noise(batch, size, dtype=dtype, device=conftest.DEVICE)
        return create_model(model).to(conftest.DEVICE, dtype), x

    suite.run(
        benchmark,
        contender,
        level="model",
        case=f"{model} @{size}, batch {batch}, {dtype_name}",
        make=make,
        batch=batch,
    )
