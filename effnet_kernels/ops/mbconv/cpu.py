"""``mbconv`` in native C++: csrc/cpu/mbconv.h."""

from effnet_kernels.ops.mbconv.op import fake
from effnet_kernels.ops.native_cpu import bind

supports, run = bind("mbconv", fake, weights=(1, 4, 13))
