"""``act(bn(conv(x)))``, then an optional 1x1 projection with its own bn, then the residual: the definition.

Without the projection this is a plain convolution with BN and activation: the stem, and V2's first stage.
"""

from collections.abc import Sequence

from torch import Tensor

from effnet_kernels.dispatch import Problem
from effnet_kernels.ops.common import batch_norm_act, convolve, to_nhwc


def supports(problem: Problem) -> tuple[bool, str]:
    return True, "any problem"


def run(
    x: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_mid, C_in, KH, KW]
    bn: Sequence[Tensor],  # gamma, beta, running_mean, running_var: [C_mid]
    eps: float,
    stride: Sequence[int],  # (vertical, horizontal)
    padding: Sequence[int],  # (top, bottom, left, right)
    act: str,
    project_weight: Tensor | None,  # [C_out, C_mid, 1, 1]
    project_bn: Sequence[Tensor],  # four of [C_out], or empty
    project_eps: float,
    residual: bool,  # add x at the end
) -> Tensor:  # [N, C_out or C_mid, OH, OW]
    y = batch_norm_act(convolve(x, weight, stride, padding), bn, eps, act)
    if project_weight is not None:
        y = batch_norm_act(convolve(y.to(x.dtype), project_weight), project_bn, project_eps, "identity")
    if residual:
        y = y + x
    return to_nhwc(y.to(x.dtype))
