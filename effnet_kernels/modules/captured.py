"""A frozen model on a GPU: its forward as a CUDA graph."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from effnet_kernels.ops import native_cpu
from effnet_kernels.ops.recording import Call, recording

# What is noted of a plan that ran on a GPU: there is nothing to repeat but all of it at once.
ON_GPU = Call((), [], [], native_cpu.NO_TABLE, native_cpu.NO_TABLE, native_cpu.NO_TABLE)


class Captured:
    """The frozen forward of a model on a GPU as a CUDA graph, for inputs of one form. Threads call it in turns.

    Args:
        run: the forward.
        x: its first input.
        modules: whose weights it reads.
        state: the promises that these are constant, ``program.Promises``.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor, modules: Iterable[nn.Module], state: Any) -> None:
        self.calls, self.covered, self.state = [ON_GPU], set[int](), state
        # The graph reads the weights where they are: that memory stays, whatever becomes of the parameters.
        self.memory = [
            t.untyped_storage() for module in modules for t in (*module.parameters(False), *module.buffers(False))
        ]
        self.lock, self.graph, self.done = threading.Lock(), torch.cuda.CUDAGraph(), torch.cuda.Event()
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x.device), recording(None):
            self.x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run(self.x)  # whatever a first call on a stream sets up
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.y = run(self.x)

    def holds(self, owner: nn.Module) -> bool:
        return self.state.hold(owner)

    def __call__(self, x: Tensor) -> Tensor:
        with self.lock, torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            with torch.inference_mode(False), torch.no_grad():
                self.x.copy_(x)
            self.graph.replay()
            y = self.y.clone()
            self.done.record(stream)
        return y
