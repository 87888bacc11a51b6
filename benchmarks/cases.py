"""What is measured, at every level: a title, the work, and how to measure all its contenders."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import shapes, stock, training_step
from benchmarks.shapes import Block, OpShape
from effnet_kernels.benchmarking import contenders
from effnet_kernels.benchmarking.models import create_model, noise

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Results = dict[str, dict[str, Any]]


class Case(NamedTuple):
    """One row of a table."""

    level: str  # op | block | model | sweep | training_op | training_block | training_model
    title: str
    batch: int
    make: Callable[[], tuple[nn.Module, Tensor]]  # the stock module and its input
    fused: Callable[[nn.Module, str], nn.Module] = contenders.patched
    amp: torch.dtype | None = None
    traffic: Callable[[], int] | None = None  # the least bytes that kernels like ours move
    count: int = 1  # so often in the network
    facts: tuple[tuple[str, Any], ...] = ()  # stand in the record as they are

    @property
    def trains(self) -> bool:
        return self.level.startswith("training")

    def measure(
        self,
        names: Sequence[str],
        seconds: float,
        guard: contenders.Guard = contextlib.nullcontext,
        keep: contenders.Keep | None = None,
    ) -> Results:
        """``contenders.compare`` or ``training_step.compare`` of the contenders in ``names``."""
        module, x = self.make()
        how: dict[str, Any] = {"fused": self.fused, "seconds": seconds, "guard": guard, "keep": keep}
        if self.trains:
            return training_step.compare(module, x, names, amp=self.amp, **how)
        return contenders.compare(module, x, names, **how)

    def entry(self) -> dict[str, Any]:
        """The case in a record, nothing measured yet."""
        least = None if self.traffic is None else self.traffic()
        return {"batch": self.batch, "count": self.count, "bytes": least, **dict(self.facts), "contenders": {}}


def put(entry: dict[str, Any], name: str, result: dict[str, Any], bandwidth: float | None) -> None:
    """Record a contender's result; with ``bandwidth``, of a copy, also the share of it that was reached."""
    kept = dict(result)
    if isinstance(kept.get("samples"), list):
        kept["samples"] = len(kept["samples"])
    if bandwidth and entry["bytes"] is not None and "median" in kept:
        kept["bytes_per_second"] = entry["bytes"] / kept["median"]
        kept["share_of_copy"] = kept["bytes_per_second"] / bandwidth
    entry["contenders"][name] = kept


def model_case(model: str, size: int, batch: int, dtype: str, device: str) -> Case:
    """A whole network, one forward pass."""

    def make() -> tuple[nn.Module, Tensor]:
        x = noise(batch, size, dtype=DTYPES[dtype], device=device)
        return create_model(model).to(device, DTYPES[dtype]), x

    traffic = functools.partial(shapes.network_bytes, model, size, batch, DTYPES[dtype].itemsize)
    return Case("model", f"{model} @{size}, batch {batch}, {dtype}", batch, make, traffic=traffic)


def sweep_case(model: str, size: int, batch: int, dtype: str, device: str) -> Case:
    """A point of the curves over batch sizes and resolutions."""
    facts = (("model", model), ("size", size), ("dtype", dtype))
    return model_case(model, size, batch, dtype, device)._replace(level="sweep", facts=facts)


def block_case(model: str, block: Block, count: int, batch: int, dtype: str, device: str) -> Case:
    """A block with its own weights on the map it meets in the network."""

    def make() -> tuple[nn.Module, Tensor]:
        found = create_model(model).get_submodule(block.path)
        return found.to(device, DTYPES[dtype]), _map(block, batch).to(device, DTYPES[dtype])

    title = f"{model} {block.path} {block}, batch {batch}, {dtype}"
    traffic = functools.partial(block.bytes, batch, DTYPES[dtype].itemsize)
    return Case("block", title, batch, make, traffic=traffic, count=count)


def op_case(model: str, op: OpShape, count: int, batch: int, dtype: str, device: str) -> Case:
    """An op on a map that it meets in the network."""

    def make() -> tuple[nn.Module, Tensor]:
        return stock.stock_op(op).to(device, DTYPES[dtype]), _map(op, batch).to(device, DTYPES[dtype])

    def fused(module: nn.Module, backend: str) -> nn.Module:
        return stock.OurOp(op, module, backend)

    title = f"{model} {op}, batch {batch}, {dtype}"
    traffic = functools.partial(op.bytes, batch, DTYPES[dtype].itemsize)
    return Case("op", title, batch, make, fused, traffic=traffic, count=count)


def training_case(model: str, what: OpShape | Block | int, batch: int, dtype: str, device: str) -> Case:
    """A training step of an op, of a block, or of the network at this size; 16-bit dtypes under autocast."""
    amp = None if dtype == "float32" else DTYPES[dtype]
    precision = "float32" if amp is None else f"AMP {dtype}"

    def make() -> tuple[nn.Module, Tensor]:
        if isinstance(what, int):
            return create_model(model).train().to(device), noise(batch, what, device=device)
        if isinstance(what, OpShape):
            return stock.stock_op(what).train().to(device), _map(what, batch).to(device)
        return create_model(model).get_submodule(what.path).train().to(device), _map(what, batch).to(device)

    title, element = f"{what}, batch {batch}, {precision}", DTYPES[dtype].itemsize
    if isinstance(what, OpShape):
        return Case("training_op", title, batch, make, stock.OurTrainingOp, amp, lambda: 3 * what.bytes(batch, element))
    if isinstance(what, Block):
        return Case("training_block", f"{model} {title}", batch, make, amp=amp)
    # Forward reads and writes every map, backward reads both again and their gradients, or writes them.
    traffic = functools.partial(shapes.network_bytes, model, what, 3 * batch, element)
    return Case("training_model", f"{model} @{title}", batch, make, amp=amp, traffic=traffic)


def _map(what: OpShape | Block, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, what.channels[0], what.size, what.size, generator=generator)
