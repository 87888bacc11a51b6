"""Who is compared: stock PyTorch in two layouts, torch.compile, other runtimes, and each of our backends."""

import contextlib
import copy
import importlib.util
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import effnet_kernels
from effnet_kernels.benchmarking import UserError, peers, timing
from effnet_kernels.benchmarking.agreement import agreement, exact_output, max_error
from effnet_kernels.dispatch import automatic

STOCK = "stock"
CHANNELS_LAST = "stock channels_last"
COMPILED = "torch.compile"
AUTOTUNED = "torch.compile max-autotune"  # on a GPU: measured configurations
PEERS = {"onnxruntime": peers.onnxruntime, "openvino": peers.openvino}
OURS = "effnet_kernels"

# Another runtime may round in another order (Winograd convolutions, other reductions) and still be right.
# This only asks whether it computed the same network; ours are held to ``agreement``.
PEER_ERROR = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}

# Entered, with the contender's name, around all that runs of a contender before it is timed.
Guard = Callable[[str], contextlib.AbstractContextManager[Any]]
# Told what is known of a contender as soon as it is: why it has no time, or ``alone``, the seconds of a single call.
Keep = Callable[[str, dict[str, Any]], None]


def ours(backend: str) -> str:
    """The name of our contender that runs on ``backend``."""
    return f"{OURS} {backend}"


def contender_names(
    device: str = "cpu",
    *,
    compiled: bool = True,
    with_peers: bool = True,
    models: bool = False,
    autocast: bool = False,
) -> list[str]:
    """The contenders that this environment can field on ``device``; peers run on a CPU.

    Of whole models one more of ours is frozen, as the weights of peers are; on a GPU all are, in a captured graph. With
    ``autocast`` one more has weights in float32 and runs under autocast to a 16-bit dtype.
    """
    names = [STOCK, CHANNELS_LAST]
    if compiled:
        names += [COMPILED, AUTOTUNED] if device == "cuda" else [COMPILED]
    if with_peers and device == "cpu":
        names += [name for name in PEERS if importlib.util.find_spec(name)]
    available = effnet_kernels.backends()
    fielded = [backend for backend in automatic(device) if available[backend][0]]
    of_models = ["cpu frozen", *["cpu autocast"] * autocast] if models and device == "cpu" and "cpu" in fielded else []
    return names + [ours(backend) for backend in (*of_models, *fielded)]


def patched(model: nn.Module, backend: str) -> nn.Module:
    """A patched copy of a stock model; ``backend`` may be followed by " frozen" or " autocast"."""
    name, _, how = backend.partition(" ")
    if how == "autocast":
        return _Autocast(model, name)
    return effnet_kernels.patch(copy.deepcopy(model), backend=name, frozen=how == "frozen")


class _Autocast(nn.Module):
    """A 16-bit model's weights in float32, patched and under autocast to its dtype."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        super().__init__()
        self.dtype = next(model.parameters()).dtype
        if self.dtype == torch.float32:
            raise UserError("autocast is to 16 bits")
        self.model = effnet_kernels.patch(copy.deepcopy(model).float(), backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            return self.model(x.float()).to(self.dtype)


def entry(
    name: str,
    stock: nn.Module,
    x: Tensor,
    fused: Callable[[nn.Module, str], nn.Module],
    compile_options: dict[str, Any],
) -> tuple[nn.Module, Tensor]:
    """The contender ``name`` as a module of its own, and x as it takes it. Other runtimes are none."""
    if name == STOCK:
        return copy.deepcopy(stock), x
    nhwc = x.contiguous(memory_format=torch.channels_last)
    channels_last = copy.deepcopy(stock).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if name == CHANNELS_LAST:
        return channels_last, nhwc
    if name in (COMPILED, AUTOTUNED):
        channels_last.compile(options={"max_autotune": name == AUTOTUNED, **compile_options})
        return channels_last, nhwc
    if name.startswith(f"{OURS} "):
        # On a GPU dense windows are read in channels-last memory; from another they are copied at every call.
        return fused(channels_last if x.is_cuda else stock, name.removeprefix(f"{OURS} ")), nhwc
    raise UserError(f"there is no contender {name!r}")


def build(
    name: str,
    stock: nn.Module,
    x: Tensor,
    fused: Callable[[nn.Module, str], nn.Module],
    pool: Any = None,
) -> timing.Call:
    """The contender ``name`` as a call without arguments; on a GPU a captured graph, in ``pool`` (``timing.Graph``)."""
    if name in PEERS:
        return PEERS[name](stock, x)
    # Weights as constants: what torch.compile does best for inference.
    module, x = entry(name, stock, x, fused, {"freezing": True})
    return timing.Graph(module, x, pool) if x.is_cuda else lambda: module(x)


def compare(
    stock: nn.Module,
    x: Tensor,
    names: Iterable[str],
    *,
    fused: Callable[[nn.Module, str], nn.Module] = patched,
    seconds: float = 2.0,
    progress: Callable[[str], None] = lambda line: None,
    guard: Guard = contextlib.nullcontext,
    keep: Keep | None = None,
) -> dict[str, dict[str, Any]]:
    """Check every contender against float64, then time those that agree, taking turns.

    Args:
        stock: the module in eval mode, in the dtype and on the device of x.
        x: its input, [N, C, H, W].
        names: contenders, see ``contender_names``.
        fused: makes our module from a stock one and a backend's name.
        seconds: timed for about so long each.
        progress: told what is being done.
        guard: see ``Guard``; what it raises is the contender's failure.
        keep: see ``Keep``; for those who may not come to the end.

    Returns:
        Per contender ``error`` (largest, against float64), ``median``, ``q1``, ``q3`` and ``samples`` in seconds; on a
        CPU also ``first``, the very first call, which packs weights or compiles. Or ``wrong`` / ``failed`` with the
        reason, and no time: a wrong result is not timed.
    """
    torch.compiler.reset()  # one case's compilations must not count against the next one's limit
    with torch.inference_mode():
        exact, stock_output = exact_output(stock, x), stock(x)
    race = Race(x.device.type, guard, keep)
    for name in names:
        progress(f"checking {name}")

        def prepare(name: str = name) -> tuple[timing.Call, dict[str, Any]]:
            call = build(name, stock, x, fused, race.pool)
            start = time.perf_counter()
            with torch.inference_mode():
                output = call()
            first = time.perf_counter() - start
            if wrong := _wrong(name, output, stock_output, exact):
                return call, {"wrong": wrong}
            # A graph on a GPU has been through its first calls.
            return call, {"error": max_error(output, exact)} | ({} if x.is_cuda else {"first": first})

        race.enter(name, prepare)
    progress(f"timing {len(race.calls)} contenders, about {seconds * len(race.calls):.0f} s")
    return race.run(seconds)


class Race:
    """The contenders of one case: each proves itself, then those that are right are timed, taking turns."""

    def __init__(self, device: str, guard: Guard, keep: Keep | None) -> None:
        self.device, self.guard, self.keep = device, guard, keep
        self.results: dict[str, dict[str, Any]] = {}
        self.calls: dict[str, timing.Call] = {}
        self.pool: Any = None  # of the last graph: the next one has no use for it at the same time

    def enter(self, name: str, prepare: Callable[[], tuple[timing.Call, dict[str, Any]]]) -> None:
        """``prepare`` gives the call and what is known of it."""
        try:
            with self.guard(name):
                call, result = prepare()
                right = "wrong" not in result
                alone = {"alone": timing.once(call, self.device)} if right and self.keep else {}
        except Exception as error:  # a contender that cannot run is a result, and the others go on
            right, alone, result = False, {}, {"failed": failure(error)}
        self.results[name] = result
        if self.keep:
            self.keep(name, result | alone)
        if right:
            self.calls[name] = call
            self.pool = getattr(call, "pool", self.pool)

    def run(self, seconds: float) -> dict[str, dict[str, Any]]:
        """All results, with times and samples of those that were right."""
        for name, samples in timing.interleaved(self.calls, seconds=seconds, device=self.device).items():
            self.results[name] |= {**timing.summary(samples), "samples": samples}
        return self.results


def failure(error: Exception) -> str:
    """An exception as one line."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return next(iter(f"{kind}{error}".splitlines()), "")


def _wrong(name: str, output: Tensor, stock_output: Tensor, exact: Tensor) -> str | None:
    """Why the output is not the stock module's, or None."""
    if name.startswith(OURS):
        found = agreement(output, stock_output, exact)
        if found.ok:
            return None
        return f"error {found.error:.3g}, allowed {found.bound:.3g} (stock {found.stock_error:.3g})"
    error, allowed = max_error(output, exact), PEER_ERROR[stock_output.dtype] * exact.abs().max().item()
    return None if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}"
