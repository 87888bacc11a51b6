"""``pointwise_conv_bn_act`` in CUDA C++: csrc/cuda/pointwise_conv_bn_act.cu."""

from effnet_kernels.ops.native_cuda import bind, supports
from effnet_kernels.ops.pointwise_conv_bn_act.op import fake

__all__ = ["run", "supports"]

run = bind("pointwise_conv_bn_act", fake, maps=(0, 6), vectors=(5,))
