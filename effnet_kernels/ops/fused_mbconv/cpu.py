"""``fused_mbconv`` in native C++: csrc/cpu/fused_mbconv.h."""

from effnet_kernels.ops.fused_mbconv.op import fake
from effnet_kernels.ops.native_cpu import bind

supports, run = bind("fused_mbconv", fake)
