from torch import Tensor

from effnet_kernels.dispatch import Problem, place
from effnet_kernels.ops.common import empty_nhwc, register
from effnet_kernels.ops.pointwise_conv_bn_act import reference


def fake(x, weight, bn, eps, act, gate, residual, pool) -> Tensor:  # type: ignore[no-untyped-def]
    if pool:
        return x.new_empty(x.shape[0], weight.shape[0])
    return empty_nhwc(x, weight.shape[0], x.shape[2], x.shape[3])


def problem(x: Tensor, *_: object) -> Problem:
    return Problem("pointwise_conv_bn_act", place(x), x.dtype)


op = register(
    "pointwise_conv_bn_act(Tensor x, Tensor weight, Tensor[] bn, float eps, str act, "
    "Tensor? gate, Tensor? residual, bool pool, str backend) -> Tensor",
    fake=fake,
    reference=reference.run,
    problem=problem,
)
