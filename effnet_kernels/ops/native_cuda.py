"""The glue between the ops and the CUDA library, the same for every op."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.dispatch import Problem
from effnet_kernels.native import cuda_emulated, cuda_serves
from effnet_kernels.ops.common import to_nhwc

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the depthwise convolution.
KERNELS = ((3, 3), (5, 5), (7, 7))
STRIDES = ((1, 1), (2, 2))


def supports(problem: Problem) -> tuple[bool, str]:
    """Device and dtype."""
    if problem.device_type != ("cpu" if cuda_emulated() else "cuda"):
        return False, f"the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return False, "only float32, float16 and bfloat16 have CUDA kernels"
    return (True, "any shape") if cuda_emulated() else cuda_serves(problem.device)


def supports_depthwise(problem: Problem) -> tuple[bool, str]:
    """Device, dtype, and the windows that the depthwise convolution is compiled for."""
    if problem.kernel not in KERNELS:
        return False, f"only kernels of 3x3, 5x5 and 7x7 are compiled, not {problem.kernel[0]}x{problem.kernel[1]}"
    if problem.stride not in STRIDES:
        return False, f"only strides 1 and 2, the same both ways, are compiled, not {problem.stride}"
    return supports(problem)


def bind(
    op: str,
    fake: Callable[..., Any],
    *,
    maps: tuple[int, ...] = (0,),
    vectors: tuple[int, ...] = (),
    strided: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """``run`` of one op.

    The native op has the op's own schema without ``backend``, with the outputs in front. Outputs come from the op's
    fake kernel, so the two cannot disagree.

    Args:
        maps: positions of what the native op takes in dense [N, H, W, C] memory only.
        vectors: positions of the [N, C] tensors that it takes in contiguous float32 only.
        strided: positions of tensors that it takes as they are.

    All other tensors it takes contiguous.
    """
    as_they_are = (*maps, *strided)
    native = getattr(torch.ops.effnet_kernels_cuda, op).default

    def run(*args: Any) -> Any:
        out = fake(*args)
        arguments = [a if i in as_they_are else _contiguous(a) for i, a in enumerate(args)]
        for i in maps:
            if arguments[i] is not None:
                arguments[i] = to_nhwc(arguments[i])
        for i in vectors:
            if arguments[i] is not None:
                arguments[i] = arguments[i].to(torch.float32)
        native(*(out if isinstance(out, tuple) else (out,)), *arguments)
        return out

    return run


def _contiguous(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.contiguous()
    if isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor):
        return [t.contiguous() for t in argument]
    return argument
