"""``act(bn(depthwise_conv(x)))`` and, on request, its channel means per image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from effnet_kernels.ops import native_cpu, native_cuda
from effnet_kernels.ops.common import batch_norm_act, conv_output_size, convolve, empty_nhwc, register, to_nhwc


def reference(
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


def fake(x, weight, bn, eps, stride, padding, act, with_mean) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    n, c, _, _ = x.shape
    mean_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty((n, c) if with_mean else (0,), dtype=mean_dtype)
    return empty_nhwc(x, c, *conv_output_size(x.shape, weight, stride, padding)), mean


op = register(
    "depthwise_conv_bn_act(Tensor x, Tensor weight, Tensor[] bn, float eps, int[2] stride, SymInt[4] padding, "
    "str act, bool with_mean, str backend) -> (Tensor, Tensor)",
    fake=fake,
    reference=reference,
)
cpu = native_cpu.bind("depthwise_conv_bn_act", fake)
cuda = native_cuda.bind("depthwise_conv_bn_act", fake)
