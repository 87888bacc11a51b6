"""``act(bn((x * gate) @ W)) + residual``, optionally averaged over the map: the definition."""

from collections.abc import Sequence

from torch import Tensor

from effnet_kernels.dispatch import Problem
from effnet_kernels.ops.common import batch_norm_act, convolve, to_nhwc


def supports(problem: Problem) -> tuple[bool, str]:
    return True, "any problem"


def run(
    x: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, 1, 1]
    bn: Sequence[Tensor],  # gamma, beta, running_mean, running_var: [C_out]
    eps: float,
    act: str,
    gate: Tensor | None,  # [N, C_in]
    residual: Tensor | None,  # [N, C_out, H, W]
    pool: bool,
) -> Tensor:  # [N, C_out, H, W], or [N, C_out] when pooled
    if gate is not None:
        x = x * gate[:, :, None, None].to(x.dtype)
    y = batch_norm_act(convolve(x, weight), bn, eps, act)
    if residual is not None:
        y = y + residual
    if pool:
        return y.mean((2, 3)).to(x.dtype)
    return to_nhwc(y.to(x.dtype))
