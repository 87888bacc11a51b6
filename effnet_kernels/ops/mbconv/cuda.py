"""``mbconv`` in CUDA C++: csrc/cuda/expand_depthwise*.cu and the kernels of the other ops."""

from effnet_kernels.ops.mbconv.op import fake
from effnet_kernels.ops.native_cuda import bind
from effnet_kernels.ops.native_cuda import supports_depthwise as supports

__all__ = ["run", "supports"]

run = bind("mbconv", fake)
