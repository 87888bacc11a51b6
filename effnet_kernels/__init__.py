"""Fused kernels that make EfficientNets fast as drop-in modules. See the README for use."""

from effnet_kernels.dispatch import backends, use_backend
from effnet_kernels.modules import DepthwiseConvBNAct, DepthwiseSeparableConv, FusedMBConv, MBConv, SqueezeExcite
from effnet_kernels.patching import PatchReport, patch, report, unpatch

__version__ = "0.1.0"

__all__ = [
    "DepthwiseConvBNAct",
    "DepthwiseSeparableConv",
    "FusedMBConv",
    "MBConv",
    "PatchReport",
    "SqueezeExcite",
    "backends",
    "patch",
    "report",
    "unpatch",
    "use_backend",
]
