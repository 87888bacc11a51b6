import torch
from torch import Tensor

from effnet_kernels.dispatch import Problem, place
from effnet_kernels.ops.common import conv_output_size, empty_nhwc, register
from effnet_kernels.ops.depthwise_conv_bn_act import reference


def fake(x, weight, bn, eps, stride, padding, act, with_mean) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    n, c, h, w = x.shape
    oh = conv_output_size(h, weight.shape[2], stride[0], padding[0], padding[1])
    ow = conv_output_size(w, weight.shape[3], stride[1], padding[2], padding[3])
    mean_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty((n, c) if with_mean else (0,), dtype=mean_dtype)
    return empty_nhwc(x, c, oh, ow), mean


def problem(x: Tensor, weight: Tensor, bn: object, eps: float, stride: list[int], *_: object) -> Problem:
    kernel = (weight.shape[2], weight.shape[3])
    return Problem("depthwise_conv_bn_act", place(x), x.dtype, kernel, (stride[0], stride[1]))


op = register(
    "depthwise_conv_bn_act(Tensor x, Tensor weight, Tensor[] bn, float eps, int[2] stride, SymInt[4] padding, "
    "str act, bool with_mean, str backend) -> (Tensor, Tensor)",
    fake=fake,
    reference=reference.run,
    problem=problem,
)
