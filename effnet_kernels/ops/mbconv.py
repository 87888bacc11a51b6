"""Expand, depthwise, squeeze-excite gate, project: a composition of the other ops."""

from collections.abc import Sequence

from torch import Tensor

from effnet_kernels.ops import (
    depthwise_conv_bn_act,
    native_cpu,
    native_cuda,
    pointwise_conv_bn_act,
    squeeze_excite_gate,
)
from effnet_kernels.ops.common import conv_output_size, empty_nhwc, register


def reference(
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
    pointwise, y = pointwise_conv_bn_act.reference, x
    if expand_weight is not None:
        y = pointwise(y, expand_weight, expand_bn, expand_eps, act, gate=None, residual=None, pool=False)
    y, mean = depthwise_conv_bn_act.reference(y, weight, bn, eps, stride, padding, act, with_mean=bool(se))
    gate = squeeze_excite_gate.reference(mean, se, se_act, se_gate) if se else None
    shortcut = x if residual else None
    return pointwise(y, project_weight, project_bn, project_eps, project_act, gate, shortcut, pool=False)


def fake(  # type: ignore[no-untyped-def]
    x, expand_weight, expand_bn, expand_eps, weight, bn, eps, stride, padding, act,
    se, se_act, se_gate, project_weight, project_bn, project_eps, project_act, residual,
) -> Tensor:  # fmt: skip
    return empty_nhwc(x, project_weight.shape[0], *conv_output_size(x.shape, weight, stride, padding))


op = register(
    "mbconv(Tensor x, Tensor? expand_weight, Tensor[]? expand_bn, float expand_eps, "
    "Tensor weight, Tensor[] bn, float eps, int[2] stride, SymInt[4] padding, str act, "
    "Tensor[]? se, str se_act, str se_gate, "
    "Tensor project_weight, Tensor[] project_bn, float project_eps, str project_act, "
    "bool residual, str backend) -> Tensor",
    fake=fake,
    reference=reference,
)
cpu = native_cpu.bind("mbconv", fake)
cuda = native_cuda.bind("mbconv", fake)
