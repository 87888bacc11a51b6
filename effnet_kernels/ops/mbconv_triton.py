"""``mbconv`` in Triton: expand, depthwise with sums, gate, project. Launches of the other ops' kernels.

The expanded map is written and read twice, 4 C_mid elements per pixel at stride 1, beside x and the result: the traffic
called L2 in docs/performance.md. SE costs a launch or two but no pass over a map: the depthwise convolution leaves
sums, the projection multiplies the gate in.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from effnet_kernels.ops import depthwise_conv_bn_act_triton as depthwise_conv_bn_act
from effnet_kernels.ops import pointwise_conv_bn_act_triton as pointwise_conv_bn_act
from effnet_kernels.ops import squeeze_excite_gate_triton as squeeze_excite_gate
from effnet_kernels.ops.common import conv_output_size, empty_nhwc, to_nhwc
from effnet_kernels.ops.mbconv import fake


def convolve(
    x: Tensor, expand_weight: Tensor | None, expand_bn: Sequence[Tensor], expand_eps: float,
    weight: Tensor, bn: Sequence[Tensor], eps: float, stride: Sequence[int], padding: Sequence[int], act: str,
    with_sums: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Expansion and depthwise convolution: the filtered map, and the sums of its tiles, [N, tiles, C_mid]."""
    mid = weight.shape[0]
    expanded = x
    if expand_weight is not None:
        expanded = empty_nhwc(x, mid, *x.shape[2:])
        pointwise_conv_bn_act.launch(expanded, x, expand_weight, expand_bn, expand_eps, act, None, None, False)
    filtered = empty_nhwc(x, mid, *conv_output_size(x.shape, weight, stride, padding))
    sums = depthwise_conv_bn_act.launch_sums(filtered, expanded, weight, bn, eps, stride, padding, act, with_sums)
    return filtered, sums


def launch(
    out: Tensor, x: Tensor, expand_weight: Tensor | None, expand_bn: Sequence[Tensor], expand_eps: float,
    weight: Tensor, bn: Sequence[Tensor], eps: float, stride: Sequence[int], padding: Sequence[int], act: str,
    se: Sequence[Tensor], se_act: str, se_gate: str,
    project_weight: Tensor, project_bn: Sequence[Tensor], project_eps: float, project_act: str, residual: bool,
    convolve: Callable[..., tuple[Tensor, Tensor | None]] = convolve,
) -> None:  # fmt: skip
    """Fill out. ``convolve``: what computes the first two convolutions."""
    x = to_nhwc(x)
    filtered, sums = convolve(x, expand_weight, expand_bn, expand_eps, weight, bn, eps, stride, padding, act, bool(se))
    gate = None
    if sums is not None:
        gate = sums.new_empty((len(x), weight.shape[0]))
        squeeze_excite_gate.launch_sums(gate, sums, out.shape[2] * out.shape[3], se, se_act, se_gate)
    pointwise_conv_bn_act.launch(
        out, filtered, project_weight, project_bn, project_eps, project_act, gate, x if residual else None, False
    )


def run(*args: Any) -> Tensor:
    out = fake(*args)
    launch(out, *args)
    return out
