"""``gate(W_expand @ act(W_reduce @ mean + b_reduce) + b_expand)``: the definition."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.dispatch import Problem
from effnet_kernels.ops.activations import FUNCTIONS


def supports(problem: Problem) -> tuple[bool, str]:
    return True, "any problem"


def run(
    mean: Tensor,  # [N, C] in fp32
    se: Sequence[Tensor],  # w_reduce [R, C, 1, 1], b_reduce [R], w_expand [C, R, 1, 1], b_expand [C]
    act: str,
    gate: str,
) -> Tensor:  # [N, C] in fp32
    w_reduce, b_reduce, w_expand, b_expand = (t.to(mean.dtype) for t in se)
    hidden = FUNCTIONS[act](F.linear(mean, w_reduce.flatten(1), b_reduce))
    return FUNCTIONS[gate](F.linear(hidden, w_expand.flatten(1), b_expand))
