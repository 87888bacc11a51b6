"""``squeeze_excite_gate`` in native C++: csrc/cpu/squeeze_excite_gate.h."""

from effnet_kernels.ops.squeeze_excite_gate.op import fake
from effnet_kernels.ops.native_cpu import bind

supports, run = bind("squeeze_excite_gate", fake)
