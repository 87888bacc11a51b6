"""``squeeze_excite`` in CUDA C++: csrc/cuda/squeeze_excite.cu."""

from effnet_kernels.ops.native_cuda import bind, supports
from effnet_kernels.ops.squeeze_excite.op import fake

__all__ = ["run", "supports"]

run = bind("squeeze_excite", fake)
