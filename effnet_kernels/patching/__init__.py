"""Making timm's and torchvision's models run as fused kernels, in place and reversibly."""

from effnet_kernels.patching.core import PatchReport, patch, report, unpatch

__all__ = ["PatchReport", "patch", "report", "unpatch"]
