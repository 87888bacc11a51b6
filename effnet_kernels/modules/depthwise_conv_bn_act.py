"""Depthwise convolution, BatchNorm and activation as a module."""

import torch
from torch import Tensor, nn

from effnet_kernels.functional import ConvBN
from effnet_kernels.modules import layers, reading
from effnet_kernels.modules.fusing import DepthwisePlan, Part, fuse


def read(block: nn.Module) -> DepthwisePlan:
    """The plan of a DepthwiseConvBNAct."""
    children = block.__dict__["_modules"]
    weight, geometry = reading.spatial(children["conv"], depthwise=True)
    bn, act = reading.batch_norm(children["bn"])
    return DepthwisePlan(ConvBN(weight, bn), geometry, act, False, None, [children["bn"]])


WHOLE = Part(read)


class DepthwiseConvBNAct(nn.Module):
    """``act(bn(conv(x)))`` with a depthwise convolution, ``[N, C, H, W]`` to ``[N, C, OH, OW]``.

    The state_dict has ``conv`` and ``bn``. It runs as one op, in training mode too
    where the backend trains, else as plain PyTorch.

    Args:
        in_chs: channels C.
        kernel_size, stride, dilation: of the convolution; dilation other than 1 is not fused.
        pad_type: '' pads symmetrically, 'same' as TensorFlow does, an int by that many pixels.
        act_layer: name or torch.nn class of identity, relu, relu6, silu, hardswish.
        norm_layer: torch.nn.BatchNorm2d or a functools.partial of it.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range or not supported.
    """

    def __init__(
        self,
        in_chs: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        pad_type: str | int = "",
        act_layer: layers.Layer = nn.ReLU,
        norm_layer: layers.NormLayer = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = layers.conv2d(
            in_chs, in_chs, kernel_size, stride=stride, dilation=dilation, groups=in_chs, pad_type=pad_type,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.bn = layers.batch_norm_act(in_chs, act_layer, norm_layer, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = fuse(WHOLE, self, x)
        return self.bn(self.conv(x)) if y is None else y
