"""Fused-MBConv (https://arxiv.org/abs/2104.00298), also called EdgeResidual, as a module."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from effnet_kernels.functional import ConvBN
from effnet_kernels.modules import layers, reading
from effnet_kernels.modules.fusing import FusedMBConvPlan, Part, fuse


def read(block: nn.Module) -> FusedMBConvPlan:
    """The plan of a block with the children of timm's EdgeResidual."""
    d = block.__dict__
    children = d["_modules"]
    reading.no_op(children.get("aa"), "anti-aliasing")
    weight, geometry = reading.spatial(children["conv_exp"], depthwise=False)
    bn, act = reading.batch_norm(children["bn1"])
    se = reading.squeeze_excite(children["se"])
    project_weight = reading.pointwise(children["conv_pwl"])
    project_bn, project_act = reading.batch_norm(children["bn2"])
    if project_act != "identity":
        raise reading.Unfusable(f"activation {project_act} after the projection")
    return FusedMBConvPlan(
        ConvBN(weight, bn),
        geometry,
        se,
        ConvBN(project_weight, project_bn),
        act,
        d["has_skip"],
        reading.drop_path(children["drop_path"]),
        [children["bn1"], children["bn2"]],
    )


WHOLE = Part(read)


class FusedMBConv(nn.Module):
    """Dense k x k, squeeze-and-excitation, project 1x1, shortcut; ``[N, C, H, W]`` maps.

    Constructor and state_dict are those of timm's EdgeResidual (``conv_exp, bn1, se, conv_pwl, bn2``). In eval
    mode it runs as one op (three with squeeze-and-excitation), in training mode as one where the backend
    trains, else as plain PyTorch, equal to timm's block.

    Args:
        in_chs, out_chs: channels of input and output.
        exp_kernel_size, stride, dilation: of the dense convolution; dilation other than 1 is not fused.
        pad_type: '' pads symmetrically, 'same' as TensorFlow does, an int by that many pixels.
        force_in_chs: take the inner width from this many channels instead of ``in_chs``, if not 0.
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
        exp_kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        pad_type: str | int = "",
        force_in_chs: int = 0,
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
        mid = layers.make_divisible((force_in_chs or in_chs) * exp_ratio)
        self.has_skip = stride == 1 and in_chs == out_chs and not noskip
        self.conv_exp = layers.conv2d(
            in_chs, mid, exp_kernel_size, stride=stride, dilation=dilation, pad_type=pad_type,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.bn1 = layers.batch_norm_act(mid, act_layer, norm_layer, device=device, dtype=dtype)
        self.se = se_layer(mid, act_layer=act_layer, device=device, dtype=dtype) if se_layer else nn.Identity()
        self.conv_pwl = layers.conv2d(mid, out_chs, 1, pad_type=pad_type, device=device, dtype=dtype)
        self.bn2 = layers.batch_norm_act(out_chs, nn.Identity, norm_layer, device=device, dtype=dtype)
        self.drop_path = layers.drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        y = fuse(WHOLE, self, x)
        if y is None:
            y = self.se(self.bn1(self.conv_exp(x)))
            y = self.bn2(self.conv_pwl(y))
            if self.has_skip:
                y = self.drop_path(y) + x
        return y
