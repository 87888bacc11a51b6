"""Expand, depthwise, squeeze-excite gate, project: the composition of the other ops that defines ``mbconv``."""

from collections.abc import Sequence

from torch import Tensor

from effnet_kernels.dispatch import Problem
from effnet_kernels.ops.depthwise_conv_bn_act import reference as depthwise_conv_bn_act
from effnet_kernels.ops.pointwise_conv_bn_act import reference as pointwise_conv_bn_act
from effnet_kernels.ops.squeeze_excite_gate import reference as squeeze_excite_gate


def supports(problem: Problem) -> tuple[bool, str]:
    return True, "any problem"


def run(
    x: Tensor,  # [N, C_in, H, W]
    expand_weight: Tensor | None,  # [C_mid, C_in, 1, 1]; None: C_mid is C_in
    expand_bn: Sequence[Tensor],  # gamma, beta, running_mean, running_var: [C_mid]; empty without expansion
    expand_eps: float,
    weight: Tensor,  # [C_mid, 1, KH, KW]
    bn: Sequence[Tensor],  # four of [C_mid]
    eps: float,
    stride: Sequence[int],  # (vertical, horizontal)
    padding: Sequence[int],  # (top, bottom, left, right)
    act: str,
    se: Sequence[Tensor],  # w_reduce [R, C_mid, 1, 1], b_reduce, w_expand [C_mid, R, 1, 1], b_expand; or empty
    se_act: str,
    se_gate: str,
    project_weight: Tensor,  # [C_out, C_mid, 1, 1]
    project_bn: Sequence[Tensor],  # four of [C_out]
    project_eps: float,
    project_act: str,
    residual: bool,  # add x at the end
) -> Tensor:  # [N, C_out, OH, OW]
    y = x
    if expand_weight is not None:
        y = pointwise_conv_bn_act.run(y, expand_weight, expand_bn, expand_eps, act, None, None, False)
    y, mean = depthwise_conv_bn_act.run(y, weight, bn, eps, stride, padding, act, bool(se))
    gate = squeeze_excite_gate.run(mean, se, se_act, se_gate) if se else None
    shortcut = x if residual else None
    return pointwise_conv_bn_act.run(y, project_weight, project_bn, project_eps, project_act, gate, shortcut, False)
