"""The glue between the ops and the native CPU library, the same for every op."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels.backends import Problem
from effnet_kernels.native import packed
from effnet_kernels.ops.common import to_nhwc

# The ops that the library can keep a call of, with all arguments but x and the output.
KEPT = ("pointwise_conv_bn_act", "fused_mbconv", "mbconv")


class Call(NamedTuple):
    """One call of a native op."""

    op: str
    leading: list[Any]  # outputs, packed copies
    weights: list[Tensor]  # that the copies are of
    arguments: list[Any]  # x first

    def repeats(self, x: Tensor, y: Tensor) -> bool:
        """Whether it was the way from x to y, and could be gone again: the weights have versions."""
        return (
            self.op in KEPT
            and self.leading[0] is y
            and [argument is x for argument in self.arguments].count(True) == 1
            and self.arguments[0] is x
            and not any(weight.is_inference() for weight in self.weights)
        )


_watcher = threading.local()


@contextlib.contextmanager
def watching() -> Iterator[list[Call]]:
    """The native calls that this thread makes inside the ``with`` block."""
    _watcher.calls = []
    try:
        yield _watcher.calls
    finally:
        _watcher.calls = None


DTYPES = (torch.float32, torch.bfloat16)


def bind(
    op: str,
    fake: Callable[..., Any],
    *,
    dense: tuple[int, ...] = (0,),
    weights: tuple[int, ...] = (),
    vectors: tuple[int, ...] = (),
) -> tuple[Callable[[Problem], tuple[bool, str]], Callable[..., Any]]:
    """``supports`` and ``run`` of one op.

    The native op has the op's own schema without ``backend``; in front of it come the outputs and, for ops
    with convolution weights, a list of their packed copies. Outputs come from the op's fake kernel, so the
    two cannot disagree.

    Args:
        dense: positions of the maps that the native op takes in dense [N, H, W, C] only.
        weights: positions of the convolution weights.
        vectors: positions of the [N, C] tensors that it takes in contiguous float32 only.
    """
    native = getattr(torch.ops.effnet_kernels_cpu, op).default

    def supports(problem: Problem) -> tuple[bool, str]:
        if problem.device != "cpu":
            return False, f"the tensors are on {problem.device}"
        if problem.dtype not in DTYPES:
            return False, "only float32 and bfloat16 have CPU kernels"
        return True, "any shape"

    def run(*args: Any) -> Any:
        out = fake(*args)
        arguments = list(args)
        for i in dense:
            if arguments[i] is not None:
                arguments[i] = to_nhwc(arguments[i])
        for i in vectors:
            if arguments[i] is not None:
                arguments[i] = arguments[i].to(torch.float32).contiguous()
        leading = list(out) if isinstance(out, tuple) else [out]
        copied = [args[i] for i in weights if args[i] is not None]
        if weights:
            leading.append([packed(weight) for weight in copied])
        native(*leading, *arguments)
        watcher = getattr(_watcher, "calls", None)
        if watcher is not None:
            watcher.append(Call(op, leading, copied, arguments))
        return out

    return supports, run
