"""The glue between the ops and the native CPU library, the same for every op."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.backends import Problem
from effnet_kernels.ops.common import to_nhwc

DTYPES = (torch.float32, torch.bfloat16)


def bind(op: str, fake: Callable[..., Any]) -> tuple[Callable[[Problem], tuple[bool, str]], Callable[..., Any]]:
    """``supports`` and ``run`` of one op.

    The native op has the op's own schema, with the output in front and without ``backend``. The output
    comes from the op's fake kernel, so the two cannot disagree; maps arrive in dense [N, H, W, C].
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
        args = tuple(to_nhwc(arg) if isinstance(arg, Tensor) and arg.dim() == 4 else arg for arg in args)
        native(out, *args)
        return out

    return supports, run
