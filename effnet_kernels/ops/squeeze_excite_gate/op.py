import torch
from torch import Tensor

from effnet_kernels.dispatch import Problem, place
from effnet_kernels.ops.common import register
from effnet_kernels.ops.squeeze_excite_gate import reference


def fake(mean, se, act, gate) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.empty_like(mean, memory_format=torch.contiguous_format)


def problem(mean: Tensor, *_: object) -> Problem:
    return Problem("squeeze_excite_gate", place(mean), mean.dtype)


op = register(
    "squeeze_excite_gate(Tensor mean, Tensor[] se, str act, str gate, str backend) -> Tensor",
    fake=fake,
    reference=reference.run,
    problem=problem,
)
