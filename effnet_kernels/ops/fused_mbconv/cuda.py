"""``fused_mbconv`` in CUDA C++: csrc/cuda/fused_mbconv.cu."""

from typing import Any

from effnet_kernels.ops.fused_mbconv.op import fake
from effnet_kernels.ops.native_cuda import bind, supports

__all__ = ["run", "supports"]

# The kernel gathers its window of x from any strides: an NCHW image costs the stem no extra pass. A residual is
# read in place, so there x must be dense.
_run_any = bind("fused_mbconv", fake, maps=(1,), strided=(0,))
_run_dense = bind("fused_mbconv", fake, maps=(0, 1))


def run(*args: Any) -> Any:
    residual = args[-1]
    return _run_dense(*args) if residual else _run_any(*args)
