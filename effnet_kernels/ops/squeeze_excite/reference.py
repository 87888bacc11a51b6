"""Squeeze-and-Excitation on its own, ``x * squeeze_excite_gate(mean(x))``: the definition."""

from collections.abc import Sequence

from torch import Tensor

from effnet_kernels.dispatch import Problem
from effnet_kernels.ops.common import to_nhwc, wide
from effnet_kernels.ops.squeeze_excite_gate import reference as squeeze_excite_gate


def supports(problem: Problem) -> tuple[bool, str]:
    return True, "any problem"


def run(
    x: Tensor,  # [N, C, H, W]
    se: Sequence[Tensor],  # w_reduce [R, C, 1, 1], b_reduce [R], w_expand [C, R, 1, 1], b_expand [C]
    act: str,
    gate: str,
) -> Tensor:  # [N, C, H, W]
    scale = squeeze_excite_gate.run(wide(x).mean((2, 3)), se, act, gate)
    return to_nhwc((wide(x) * scale[:, :, None, None]).to(x.dtype))
