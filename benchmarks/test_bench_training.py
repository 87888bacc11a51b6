"""Training steps of ops, blocks and whole networks: time, and memory for backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import conftest, shapes, stock
from effnet_kernels.benchmarking import contenders, training
from effnet_kernels.benchmarking.models import create_model, noise

Case = tuple[str, str, Any, int, torch.dtype | None]  # level, model, problem (or size), batch, autocast


def cases(config: pytest.Config) -> list[Case]:
    """Ops and blocks that move the most bytes, and the network itself; each at every dtype asked for."""
    limit = config.getoption("--limit") or None
    found: list[Case] = []
    for model in conftest.models(config):
        size = config.getoption("--size") or shapes.MODELS[model]
        ops = [op for op in shapes.largest(shapes.ops(model, size), limit) if op.kind in ("depthwise", "pointwise")]
        problems = [("training_op", op) for op in ops]
        problems += [("training_block", block) for block in shapes.largest(shapes.blocks(model, size), limit)]
        problems.append(("training_model", size))
        for batch in conftest.batches(config, "8", "128"):
            for name in conftest.dtypes(config):
                amp = None if name == "float32" else conftest.DTYPES[name]
                found += [(level, model, problem, batch, amp) for level, problem in problems]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    names = training.contender_names(conftest.DEVICE, compiled=not config.getoption("--no-compile"))
    metafunc.parametrize("trained", names)
    metafunc.parametrize("case", cases(config), ids=title)


def title(case: Case) -> str:
    level, model, problem, batch, amp = case
    what = f"@{problem}" if level == "training_model" else f"{problem}"
    place = "" if level == "training_op" else model
    return f"{place} {what}, batch {batch}, {'float32' if amp is None else f'AMP {amp}'.replace('torch.', '')}".strip()


def make(case: Case) -> tuple[nn.Module, Tensor]:
    """The stock module in training mode and its input."""
    level, model, problem, batch, _ = case
    generator = torch.Generator().manual_seed(1)
    if level == "training_op":
        x = torch.randn(batch, problem.channels[0], problem.size, problem.size, generator=generator)
        return stock.stock_op(problem).train().to(conftest.DEVICE), x.to(conftest.DEVICE)
    if level == "training_block":
        x = torch.randn(batch, problem.channels[0], problem.size, problem.size, generator=generator)
        return create_model(model).get_submodule(problem.path).train().to(conftest.DEVICE), x.to(conftest.DEVICE)
    return create_model(model).train().to(conftest.DEVICE), noise(batch, problem, device=conftest.DEVICE)


@pytest.mark.benchmark(timer=conftest.CLOCK)
def test_training(benchmark: Any, suite: conftest.Suite, case: Case, trained: str) -> None:
    level, *_, batch, amp = case

    def measure(seconds: float) -> dict[str, dict[str, Any]]:
        module, x = make(case)
        names = training.contender_names(conftest.DEVICE, compiled=not suite.config.getoption("--no-compile"))
        fused = contenders.patched if level != "training_op" else stock.OurTrainingOp
        return training.compare(module, x, names, amp=amp, fused=fused, seconds=seconds)

    suite.replay(benchmark, trained, level=level, case=title(case), batch=batch, measure=measure)
