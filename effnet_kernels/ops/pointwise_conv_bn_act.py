"""``act(bn((x * gate) @ W)) + residual``, optionally averaged over the map."""

from collections.abc import Sequence

from torch import Tensor

from effnet_kernels.ops import native_cpu, native_cuda
from effnet_kernels.ops.common import batch_norm_act, convolve, empty_nhwc, register, to_nhwc


def reference(
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


def fake(x, weight, bn, eps, act, gate, residual, pool) -> Tensor:  # type: ignore[no-untyped-def]
    if pool:
        return x.new_empty(x.shape[0], weight.shape[0])
    return empty_nhwc(x, weight.shape[0], x.shape[2], x.shape[3])


op = register(
    "pointwise_conv_bn_act(Tensor x, Tensor weight, Tensor[] bn, float eps, str act, "
    "Tensor? gate, Tensor? residual, bool pool, str backend) -> Tensor",
    fake=fake,
    reference=reference,
)
cpu = native_cpu.bind("pointwise_conv_bn_act", fake, dense=("x", "residual"), vectors=("gate",))
cuda = native_cuda.bind("pointwise_conv_bn_act", fake, dense=("x", "residual"), vectors=("gate",))
