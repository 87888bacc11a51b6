"""The glue between the ops and the CUDA library, the same for every op."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.dispatch import Query
from effnet_kernels.native import cuda_emulated, cuda_serves
from effnet_kernels.ops.common import to_nhwc

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The ops that always have a depthwise convolution, and what it is compiled for.
DEPTHWISE = ("depthwise_conv_bn_act", "mbconv")
KERNELS = ((3, 3), (5, 5), (7, 7))
STRIDES = ((1, 1), (2, 2))


def supports(query: Query) -> tuple[bool, str]:
    """Device, dtype, and the windows that the depthwise convolution is compiled for."""
    if query.op in DEPTHWISE and query.kernel not in KERNELS:
        return False, f"only kernels of 3x3, 5x5 and 7x7 are compiled, not {query.kernel[0]}x{query.kernel[1]}"
    if query.op in DEPTHWISE and query.stride not in STRIDES:
        return False, f"only strides 1 and 2, the same both ways, are compiled, not {query.stride}"
    if query.device_type != ("cpu" if cuda_emulated() else "cuda"):
        return False, f"the tensors are on {query.device}"
    if query.dtype not in DTYPES:
        return False, "only float32, float16 and bfloat16 have CUDA kernels"
    return (True, "any shape") if cuda_emulated() else cuda_serves(query.device)


def bind(
    op: str,
    fake: Callable[..., Any],
    *,
    dense: tuple[str, ...] = ("x",),
    vectors: tuple[str, ...] = (),
    strided_unless: str | None = None,
) -> Callable[..., Any]:
    """The op on this backend: see ``native_cpu.bind``. All tensors but x are contiguous, or ``dense``."""
    names = [*inspect.signature(fake).parameters]

    def run(*args: Any) -> Any:
        out = fake(*args)
        arguments = dict(zip(names, args, strict=True))
        as_it_is = strided_unless is not None and not arguments[strided_unless]
        for name, argument in arguments.items():
            if argument is None or (as_it_is and name == "x"):
                continue
            if name in dense:
                arguments[name] = to_nhwc(argument)
            elif name in vectors:
                arguments[name] = argument.to(torch.float32).contiguous()
            else:
                arguments[name] = _contiguous(argument)
        native = getattr(torch.ops.effnet_kernels_cuda, op).default
        native(*(out if isinstance(out, tuple) else (out,)), *arguments.values())
        return out

    return run


def _contiguous(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.contiguous()
    if isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor):
        return [t.contiguous() for t in argument]
    return argument
