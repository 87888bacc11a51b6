from torch import Tensor

from effnet_kernels.dispatch import Problem, place
from effnet_kernels.ops.common import empty_nhwc, register
from effnet_kernels.ops.squeeze_excite import reference


def fake(x, se, act, gate) -> Tensor:  # type: ignore[no-untyped-def]
    return empty_nhwc(x, x.shape[1], x.shape[2], x.shape[3])


def problem(x: Tensor, *_: object) -> Problem:
    return Problem("squeeze_excite", place(x), x.dtype)


op = register(
    "squeeze_excite(Tensor x, Tensor[] se, str act, str gate, str backend) -> Tensor",
    fake=fake,
    reference=reference.run,
    problem=problem,
)
