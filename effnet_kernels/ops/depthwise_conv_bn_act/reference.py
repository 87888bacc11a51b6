"""``act(bn(depthwise_conv(x)))`` and, on request, its per-image channel means: the definition."""

from collections.abc import Sequence

from torch import Tensor

from effnet_kernels.dispatch import Problem
from effnet_kernels.ops.common import batch_norm_act, convolve, to_nhwc


def supports(problem: Problem) -> tuple[bool, str]:
    return True, "any problem"


def run(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C, 1, KH, KW]
    bn: Sequence[Tensor],  # gamma, beta, running_mean, running_var: [C]
    eps: float,
    stride: Sequence[int],  # (vertical, horizontal)
    padding: Sequence[int],  # (top, bottom, left, right)
    act: str,
    with_mean: bool,
) -> tuple[Tensor, Tensor]:  # [N, C, OH, OW] and the means [N, C] in fp32, or [0]
    y = batch_norm_act(convolve(x, weight, stride, padding), bn, eps, act)
    mean = y.mean((2, 3)) if with_mean else y.new_empty(0)
    return to_nhwc(y.to(x.dtype)), mean
