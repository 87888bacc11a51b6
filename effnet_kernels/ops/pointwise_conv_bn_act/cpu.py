"""``pointwise_conv_bn_act`` in native C++: csrc/cpu/pointwise_conv_bn_act.h."""

from effnet_kernels.ops.native_cpu import bind, supports
from effnet_kernels.ops.pointwise_conv_bn_act.op import fake

__all__ = ["run", "supports"]

run = bind("pointwise_conv_bn_act", fake, dense=("x", "residual"), vectors=("gate",))
