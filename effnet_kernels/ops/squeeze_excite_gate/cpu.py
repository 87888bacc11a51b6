"""``squeeze_excite_gate`` in native C++: csrc/cpu/squeeze_excite.h."""

from collections.abc import Sequence

import torch
from torch import Tensor

from effnet_kernels.ops.native_cpu import bind, supports
from effnet_kernels.ops.squeeze_excite_gate.op import fake

__all__ = ["run", "supports"]

_run = bind("squeeze_excite_gate", fake, dense=(), vectors=("mean",))


def run(mean: Tensor, se: Sequence[Tensor], act: str, gate: str) -> Tensor:
    """The weights may be of any dtype of maps, the native op takes those that maps have on a CPU."""
    return _run(mean, [t.float() if t.dtype == torch.float16 else t for t in se], act, gate)
