"""``act(bn(conv(x)))``, then an optional 1x1 projection with its own bn, then the residual.

Without the projection this is a plain convolution with BN and activation: the stem, and V2's first stage.
"""

from collections.abc import Sequence

from torch import Tensor

from effnet_kernels.ops import native_cpu, native_cuda
from effnet_kernels.ops.common import batch_norm_act, conv_output_size, convolve, empty_nhwc, register, to_nhwc


def reference(
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


def fake(  # type: ignore[no-untyped-def]
    x, weight, bn, eps, stride, padding, act, project_weight, project_bn, project_eps, residual
) -> Tensor:
    last = weight if project_weight is None else project_weight
    return empty_nhwc(x, last.shape[0], *conv_output_size(x.shape, weight, stride, padding))


op = register(
    "fused_mbconv(Tensor x, Tensor weight, Tensor[] bn, float eps, int[2] stride, SymInt[4] padding, str act, "
    "Tensor? project_weight, Tensor[]? project_bn, float project_eps, bool residual, str backend) -> Tensor",
    fake=fake,
    reference=reference,
)
# The kernels copy their window of x anyway, from any strides: an NCHW image costs the stem no extra pass. A residual is
# read in place.
cpu = native_cpu.bind("fused_mbconv", fake, strided_unless="residual")
cuda = native_cuda.bind("fused_mbconv", fake, dense=("x", "weight"), strided_unless="residual")
