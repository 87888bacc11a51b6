"""Training steps: who is compared, whether the gradients are right, how long, and in how much memory."""

import contextlib
import copy
import ctypes
import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from effnet_kernels.benchmarking import contenders, timing
from effnet_kernels.benchmarking.agreement import measure

# Gradients against float64: ours at most so many times stock's error, as a root mean square over all of them.
ALLOWED = 2.0


def contender_names(device: str, *, compiled: bool = True) -> list[str]:
    """The contenders of a training step: other runtimes only infer."""
    return contenders.contender_names(device, compiled=compiled, with_peers=False)


class Step:
    """Forward, backward from a fixed gradient of the output, and SGD, on one module and one batch."""

    def __init__(self, module: nn.Module, x: Tensor, amp: torch.dtype | None) -> None:
        self.module, self.x, self.amp = module, x, amp
        self.optimizer = torch.optim.SGD(module.parameters(), 1e-4)
        self.grad: Tensor | None = None

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __call__(self, x: Tensor | None = None) -> None:
        """One step, on another batch of the same size if one is given."""
        self.x = self.x if x is None else x
        self.optimizer.zero_grad(set_to_none=True)
        self.backward()
        self.optimizer.step()

    def forward(self) -> Tensor:
        with torch.autocast(self.x.device.type, self.amp, enabled=self.amp is not None):
            return self.module(self.x)

    def backward(self) -> None:
        y = self.forward()
        if self.grad is None:
            noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)) / y.numel() ** 0.5
            self.grad = noise.to(y.device, y.dtype)
        y.backward(self.grad)

    def gradients(self) -> Tensor:
        """All gradients of one step, flat and in float64, the module and its buffers left as they were."""
        module = self.module
        self.module = copy.deepcopy(module)
        self.backward()
        found = [p.grad.double().flatten() for p in self.module.parameters() if p.grad is not None]
        self.module = module
        return torch.cat(found)

    def saved_bytes(self) -> int:
        """What autograd keeps for backward, parameters and buffers left out, each storage once."""
        own = {t.untyped_storage().data_ptr() for t in (*self.module.parameters(), *self.module.buffers())}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(t: Tensor) -> None:  # a node that kept its own output would keep itself alive
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage

        def unpack(_: None) -> NoReturn:
            raise AssertionError("nothing runs backward")

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            self.forward()
        return sum(storage.nbytes() for storage in kept.values())

    def peak_bytes(self) -> int | None:
        """What one step needs at its peak beyond what is there before it: device memory, or resident memory."""
        if self.x.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self()
            return torch.cuda.max_memory_allocated() - before
        if sys.platform != "linux":
            return None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed must not hide what this one needs
        before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self()
        lines = Path("/proc/self/status").read_text().splitlines()
        (peak,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return peak - before


def build(
    name: str, stock: nn.Module, x: Tensor, amp: torch.dtype | None, fused: Callable[[nn.Module, str], nn.Module]
) -> Step:
    """The contender ``name`` as a training step. Parameters are its own."""
    return Step(*contenders.entry(name, stock, x, fused, {}), amp)


def compare(
    stock: nn.Module,
    x: Tensor,
    names: Iterable[str],
    *,
    amp: torch.dtype | None = None,
    fused: Callable[[nn.Module, str], nn.Module] = contenders.patched,
    seconds: float = 2.0,
    guard: contenders.Guard = contextlib.nullcontext,
    keep: contenders.Keep | None = None,
) -> dict[str, dict[str, Any]]:
    """Check every contender's gradients against float64, measure its memory, then time those that are right.

    On a GPU a step is timed as a captured graph (``timing.Graph``).

    Args:
        stock: the module in training mode, float32, on the device of x.
        x: its input, [N, C, H, W].
        names: contenders, see ``contender_names``.
        amp: autocast to this dtype.
        fused: makes our module from a stock one and a backend's name.
        seconds: timed for about so long each.
        guard, keep: see ``contenders``.

    Returns:
        As ``contenders.compare``, with ``error`` of the gradients and, in bytes, ``saved`` for backward and the
        ``peak`` of a step.
    """
    exact = Step(copy.deepcopy(stock).double(), x.double(), None).gradients()
    scale = _rms(exact)
    allowed = ALLOWED * measure(_rms(Step(stock, x, amp).gradients() - exact)) + 1e-6 * scale
    torch.compiler.reset()  # as in ``contenders.compare``
    race = contenders.Race(x.device.type, guard, keep)
    for name in names:

        def prepare(name: str = name) -> tuple[timing.Call, dict[str, Any]]:
            step = build(name, stock, x, amp, fused)
            error = _rms(step.gradients() - exact)
            if name.startswith(contenders.OURS) and not error <= allowed:
                return step, {"wrong": f"error of the gradients {error:.3g}, allowed {allowed:.3g}"}
            step()
            result = {"error": error / scale, "saved": step.saved_bytes(), "peak": step.peak_bytes()}
            if not x.is_cuda:
                return step, result
            step.optimizer.zero_grad(set_to_none=True)
            return timing.Graph(step, step.x, race.pool), result

        race.enter(name, prepare)
    return race.run(seconds)


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()
