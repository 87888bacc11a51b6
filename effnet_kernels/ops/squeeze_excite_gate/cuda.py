"""``squeeze_excite_gate`` in CUDA C++: csrc/cuda/squeeze_excite.cu."""

from effnet_kernels.ops.native_cuda import bind, supports
from effnet_kernels.ops.squeeze_excite_gate.op import fake

__all__ = ["run", "supports"]

run = bind("squeeze_excite_gate", fake, maps=(), vectors=(0,))
