"""``mbconv`` in native C++: csrc/cpu/mbconv.h."""

from effnet_kernels.ops.mbconv.op import fake
from effnet_kernels.ops.native_cpu import bind, supports

__all__ = ["run", "supports"]

run = bind("mbconv", fake)
