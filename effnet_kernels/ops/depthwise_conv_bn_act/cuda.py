"""``depthwise_conv_bn_act`` in CUDA C++: csrc/cuda/depthwise_conv_bn_act.cu, in 16 bits depthwise_mma.cu."""

from effnet_kernels.ops.depthwise_conv_bn_act.op import fake
from effnet_kernels.ops.native_cuda import bind
from effnet_kernels.ops.native_cuda import supports_depthwise as supports

__all__ = ["run", "supports"]

run = bind("depthwise_conv_bn_act", fake)
