from torch import Tensor

from effnet_kernels.dispatch import Problem, place
from effnet_kernels.ops.common import conv_output_size, empty_nhwc, register
from effnet_kernels.ops.mbconv import reference


def fake(  # type: ignore[no-untyped-def]
    x, expand_weight, expand_bn, expand_eps, weight, bn, eps, stride, padding, act,
    se, se_act, se_gate, project_weight, project_bn, project_eps, project_act, residual,
) -> Tensor:  # fmt: skip
    oh = conv_output_size(x.shape[2], weight.shape[2], stride[0], padding[0], padding[1])
    ow = conv_output_size(x.shape[3], weight.shape[3], stride[1], padding[2], padding[3])
    return empty_nhwc(x, project_weight.shape[0], oh, ow)


def problem(
    x: Tensor, expand_weight: object, expand_bn: object, expand_eps: float,
    weight: Tensor, bn: object, eps: float, stride: list[int], *_: object,
) -> Problem:  # fmt: skip
    kernel = (weight.shape[2], weight.shape[3])
    return Problem("mbconv", place(x), x.dtype, kernel, (stride[0], stride[1]))


op = register(
    "mbconv(Tensor x, Tensor? expand_weight, Tensor[]? expand_bn, float expand_eps, "
    "Tensor weight, Tensor[] bn, float eps, int[2] stride, SymInt[4] padding, str act, "
    "Tensor[]? se, str se_act, str se_gate, "
    "Tensor project_weight, Tensor[] project_bn, float project_eps, str project_act, "
    "bool residual, str backend) -> Tensor",
    fake=fake,
    reference=reference.run,
    problem=problem,
)
