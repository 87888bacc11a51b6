"""``squeeze_excite_gate`` in native C++: csrc/cpu/squeeze_excite.h."""

from effnet_kernels.ops.native_cpu import bind
from effnet_kernels.ops.squeeze_excite_gate.op import fake

supports, run = bind("squeeze_excite_gate", fake, dense=(), vectors=(0,))
