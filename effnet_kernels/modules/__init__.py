"""EfficientNet's blocks as modules that need neither timm nor torchvision."""

from effnet_kernels.modules.depthwise_conv_bn_act import DepthwiseConvBNAct
from effnet_kernels.modules.depthwise_separable_conv import DepthwiseSeparableConv
from effnet_kernels.modules.fused_mbconv import FusedMBConv
from effnet_kernels.modules.mbconv import MBConv
from effnet_kernels.modules.squeeze_excite import SqueezeExcite

__all__ = ["DepthwiseConvBNAct", "DepthwiseSeparableConv", "FusedMBConv", "MBConv", "SqueezeExcite"]
