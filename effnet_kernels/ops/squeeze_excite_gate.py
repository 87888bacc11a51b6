"""``gate(W_expand @ act(W_reduce @ mean + b_reduce) + b_expand)``: squeeze-and-excitation from channel means."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.ops import native_cpu, native_cuda
from effnet_kernels.ops.activations import FUNCTIONS
from effnet_kernels.ops.common import register


def reference(
    mean: Tensor,  # [N, C] in fp32
    se: Sequence[Tensor],  # w_reduce [R, C, 1, 1], b_reduce [R], w_expand [C, R, 1, 1], b_expand [C]
    act: str,
    gate: str,
) -> Tensor:  # [N, C] in fp32
    w_reduce, b_reduce, w_expand, b_expand = (t.to(mean.dtype) for t in se)
    hidden = FUNCTIONS[act](F.linear(mean, w_reduce.flatten(1), b_reduce))
    return FUNCTIONS[gate](F.linear(hidden, w_expand.flatten(1), b_expand))


def fake(mean, se, act, gate) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.empty_like(mean, memory_format=torch.contiguous_format)


op = register(
    "squeeze_excite_gate(Tensor mean, Tensor[] se, str act, str gate, str backend) -> Tensor",
    fake=fake,
    reference=reference,
)
_cpu = native_cpu.bind("squeeze_excite_gate", fake, dense=(), vectors=("mean",))
cuda = native_cuda.bind("squeeze_excite_gate", fake, dense=(), vectors=("mean",))


def cpu(mean: Tensor, se: Sequence[Tensor], act: str, gate: str) -> Tensor:
    """The native op takes weights of the dtype of ``mean`` or bfloat16: float16 is widened."""
    return _cpu(mean, [t.float() if t.dtype == torch.float16 else t for t in se], act, gate)
