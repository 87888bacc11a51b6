"""Interleaved timing on a CPU, and through CUDA graphs on a GPU.

Contenders take turns in random order, so that a slow minute of the machine falls on all of them.
A turn is one untimed call, which brings the contender's weights and threads back, and then timed ones.
"""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]

TURN_SECONDS = 0.05
MIN_ROUNDS = 5
MAX_ROUNDS = 100
WARM_UP = 3  # calls before a capture: they compile, tune and fill caches


@torch.inference_mode()
def interleaved(calls: Mapping[str, Call], *, seconds: float = 2.0, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds per call, one sample per turn, for each of ``calls``; about ``seconds`` are spent on each.

    For a ``Graph`` they are seconds of one call of its function.
    """
    measure = _measure_cuda if device == "cuda" else _measure_cpu
    repeats, rounds = {}, MAX_ROUNDS
    for name, call in calls.items():
        call()
        once = measure(call, 1)
        repeats[name] = max(1, round(TURN_SECONDS / once))
        rounds = min(rounds, int(seconds / (once * (repeats[name] + 1))))
    rounds = max(rounds, MIN_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, generator = list(calls), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            calls[name]()
            samples[name].append(measure(calls[name], repeats[name]) / getattr(calls[name], "calls", 1))
    return samples


@torch.inference_mode()
def once(call: Call, device: str = "cpu") -> float:
    """Seconds of a single call that an untimed one has gone before; of a ``Graph`` as in ``interleaved``."""
    call()
    return (_measure_cuda if device == "cuda" else _measure_cpu)(call, 1) / getattr(call, "calls", 1)


def summary(samples: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def _measure_cpu(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _measure_cuda(call: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


class Graph:
    """``function`` captured in one CUDA graph, once per input buffer, so that replays do not find x in the L2.

    The buffers together are at least twice the L2, or 64 where x is small. Outputs are kept, so no two calls write the
    same memory. cuDNN measures its algorithms first, as whoever cares about speed has it do.

    Args:
        function: called with x, or with a copy of it, of the same layout.
        x: on the GPU.
        pool: memory of other graphs (``Graph.pool``) that are never replayed while the results of this one are read.
    """

    def __init__(self, function: Callable[[Tensor], Any], x: Tensor, pool: Any = None) -> None:
        cache = torch.cuda.get_device_properties(x.device).L2_cache_size
        self.calls = min(64, 1 + -(-2 * cache // max(1, x.numel() * x.element_size())))
        self.function = function  # the graph reads its weights
        self.inputs = [x.clone() for _ in range(self.calls)]
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), _cudnn_measures():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function(self.inputs[0])
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph, pool=pool):
                self.outputs = [function(buffer) for buffer in self.inputs]

    def __call__(self) -> Any:
        self.graph.replay()
        return self.outputs[0]

    @property
    def pool(self) -> Any:
        """The memory that the graph's tensors lie in, as torch names it."""
        return self.graph.pool()


@contextlib.contextmanager
def _cudnn_measures() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
