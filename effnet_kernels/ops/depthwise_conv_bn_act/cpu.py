"""``depthwise_conv_bn_act`` in native C++: csrc/cpu/depthwise_conv_bn_act.h."""

from effnet_kernels.ops.depthwise_conv_bn_act.op import fake
from effnet_kernels.ops.native_cpu import bind, supports

__all__ = ["run", "supports"]

run = bind("depthwise_conv_bn_act", fake)
