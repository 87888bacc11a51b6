"""MBConv, the inverted residual (https://arxiv.org/abs/1801.04381, https://arxiv.org/abs/1905.11946), as a module."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from effnet_kernels.functional import ConvBN
from effnet_kernels.modules import layers, reading
from effnet_kernels.modules.fusing import MBConvPlan, Part, fuse


def read(block: nn.Module) -> MBConvPlan:
    """The plan of a block with the children of timm's InvertedResidual."""
    d = block.__dict__
    children = d["_modules"]
    reading.no_op(children.get("conv_s2d"), "space to depth")
    reading.no_op(children.get("aa"), "anti-aliasing")
    expand_weight = reading.pointwise(children["conv_pw"])
    expand_bn, act = reading.batch_norm(children["bn1"])
    weight, geometry = reading.spatial(children["conv_dw"], depthwise=True)
    bn, depthwise_act = reading.batch_norm(children["bn2"])
    if act != depthwise_act:
        raise reading.Unfusable(f"two different activations, {act} and {depthwise_act}")
    se = reading.squeeze_excite(children["se"])
    project_weight = reading.pointwise(children["conv_pwl"])
    project_bn, project_act = reading.batch_norm(children["bn3"])
    return MBConvPlan(
        ConvBN(expand_weight, expand_bn),
        ConvBN(weight, bn),
        geometry,
        se,
        ConvBN(project_weight, project_bn),
        act,
        project_act,
        d["has_skip"],
        reading.drop_path(children["drop_path"]),
        [children["bn1"], children["bn2"], children["bn3"]],
    )


WHOLE = Part(read)


class MBConv(nn.Module):
    """Expand 1x1, depthwise k x k, squeeze-and-excitation, project 1x1, shortcut; ``[N, C, H, W]`` maps.

    Constructor and state_dict are those of timm's InvertedResidual
    (``conv_pw, bn1, conv_dw, bn2, se, conv_pwl, bn3``). It runs as one op, in training mode too
    where the backend trains, else as plain PyTorch, equal to timm's block.

    Args:
        in_chs, out_chs: channels of input and output.
        dw_kernel_size, stride, dilation: of the depthwise convolution; dilation other than 1 is not fused.
        pad_type: '' pads symmetrically, 'same' as TensorFlow does, an int by that many pixels.
        noskip: leave out the shortcut, which is there when the stride is 1 and the channels agree.
        exp_ratio: expansion; the inner width is rounded to a multiple of 8.
        act_layer: name or torch.nn class of identity, relu, relu6, silu, hardswish.
        norm_layer: torch.nn.BatchNorm2d or a functools.partial of it.
        se_layer: called with the inner width, ``act_layer``, ``device``, ``dtype``; for instance SqueezeExcite.
        drop_path_rate: stochastic depth, in training mode.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range or not supported.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        dw_kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        pad_type: str | int = "",
        noskip: bool = False,
        exp_ratio: float = 1.0,
        act_layer: layers.Layer = nn.ReLU,
        norm_layer: layers.NormLayer = nn.BatchNorm2d,
        se_layer: Callable[..., nn.Module] | None = None,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        mid = layers.make_divisible(in_chs * exp_ratio)
        self.has_skip = stride == 1 and in_chs == out_chs and not noskip
        self.conv_pw = layers.conv2d(in_chs, mid, 1, pad_type=pad_type, device=device, dtype=dtype)
        self.bn1 = layers.batch_norm_act(mid, act_layer, norm_layer, device=device, dtype=dtype)
        self.conv_dw = layers.conv2d(
            mid, mid, dw_kernel_size, stride=stride, dilation=dilation, groups=mid, pad_type=pad_type,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.bn2 = layers.batch_norm_act(mid, act_layer, norm_layer, device=device, dtype=dtype)
        self.se = se_layer(mid, act_layer=act_layer, device=device, dtype=dtype) if se_layer else nn.Identity()
        self.conv_pwl = layers.conv2d(mid, out_chs, 1, pad_type=pad_type, device=device, dtype=dtype)
        self.bn3 = layers.batch_norm_act(out_chs, nn.Identity, norm_layer, device=device, dtype=dtype)
        self.drop_path = layers.drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        y = fuse(WHOLE, self, x)
        if y is None:
            y = self.bn1(self.conv_pw(x))
            y = self.se(self.bn2(self.conv_dw(y)))
            y = self.bn3(self.conv_pwl(y))
            if self.has_skip:
                y = self.drop_path(y) + x
        return y
