from torch import Tensor

from effnet_kernels.dispatch import Problem, place
from effnet_kernels.ops.common import conv_output_size, empty_nhwc, register
from effnet_kernels.ops.fused_mbconv import reference


def fake(  # type: ignore[no-untyped-def]
    x, weight, bn, eps, stride, padding, act, project_weight, project_bn, project_eps, residual
) -> Tensor:
    oh = conv_output_size(x.shape[2], weight.shape[2], stride[0], padding[0], padding[1])
    ow = conv_output_size(x.shape[3], weight.shape[3], stride[1], padding[2], padding[3])
    last = weight if project_weight is None else project_weight
    return empty_nhwc(x, last.shape[0], oh, ow)


def problem(x: Tensor, weight: Tensor, bn: object, eps: float, stride: list[int], *_: object) -> Problem:
    kernel = (weight.shape[2], weight.shape[3])
    return Problem("fused_mbconv", place(x), x.dtype, kernel, (stride[0], stride[1]))


op = register(
    "fused_mbconv(Tensor x, Tensor weight, Tensor[] bn, float eps, int[2] stride, SymInt[4] padding, str act, "
    "Tensor? project_weight, Tensor[]? project_bn, float project_eps, bool residual, str backend) -> Tensor",
    fake=fake,
    reference=reference.run,
    problem=problem,
)
