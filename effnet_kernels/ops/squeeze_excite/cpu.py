"""``squeeze_excite`` in native C++: csrc/cpu/squeeze_excite.h."""

from effnet_kernels.ops.native_cpu import bind, supports
from effnet_kernels.ops.squeeze_excite.op import fake

__all__ = ["run", "supports"]

run = bind("squeeze_excite", fake)
