"""``fused_mbconv`` in native C++: csrc/cpu/fused_mbconv.h."""

from typing import Any

from effnet_kernels.ops.fused_mbconv.op import fake
from effnet_kernels.ops.native_cpu import bind, supports

__all__ = ["run", "supports"]

# The kernel copies its window of x anyway, from any strides: an NCHW image costs the stem no extra pass.
# A residual is read in place, so there x must be dense.
_run_any = bind("fused_mbconv", fake, dense=())
_run_dense = bind("fused_mbconv", fake)


def run(*args: Any) -> Any:
    residual = args[-1]
    return _run_dense(*args) if residual else _run_any(*args)
