"""``pointwise_conv_bn_act`` in native C++: csrc/cpu/pointwise_conv_bn_act.h."""

from effnet_kernels.ops.native_cpu import bind
from effnet_kernels.ops.pointwise_conv_bn_act.op import fake

supports, run = bind("pointwise_conv_bn_act", fake, dense=(0, 6), weights=(1,), vectors=(5,))
