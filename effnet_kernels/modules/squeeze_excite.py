"""Squeeze-and-excitation (https://arxiv.org/abs/1709.01507) as a module."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from effnet_kernels.modules import layers, reading
from effnet_kernels.modules.fusing import Part, SqueezeExcitePlan, fuse


def read(module: nn.Module) -> SqueezeExcitePlan:
    """The plan of a module that ``reading.SQUEEZE_EXCITES`` knows."""
    se = reading.squeeze_excite(module)
    if se is None:
        raise reading.Unfusable("there is nothing to compute")
    return SqueezeExcitePlan(se)


WHOLE = Part(read)


def forward(module: nn.Module, x: Tensor) -> Tensor | None:
    """The fused forward; None in training mode, or as ``fuse``."""
    return None if module.training else fuse(WHOLE, module, x)


class SqueezeExcite(nn.Module):
    """``x * gate(expand(act(reduce(mean(x)))))`` over ``[N, C, H, W]``, dtype of x.

    Constructor and state_dict are those of timm's SqueezeExcite (``conv_reduce, conv_expand``).

    Args:
        in_chs: channels C.
        rd_ratio, rd_channels, rd_round_fn: width of the bottleneck, ``rd_channels`` or
            ``rd_round_fn(in_chs * rd_ratio)``, by default rounded to the nearest integer.
        act_layer, force_act_layer: activation between the two layers; the second has the last word.
        gate_layer: sigmoid or hardsigmoid.
        device, dtype: of the parameters.

    Raises:
        ValueError: an activation or gate that the ops do not have, or a bottleneck without channels.
    """

    def __init__(
        self,
        in_chs: int,
        rd_ratio: float = 0.25,
        rd_channels: int | None = None,
        act_layer: layers.Layer = nn.ReLU,
        gate_layer: layers.Layer = nn.Sigmoid,
        force_act_layer: layers.Layer | None = None,
        rd_round_fn: Callable[[float], int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rd_channels is None:
            rd_channels = (rd_round_fn or round)(in_chs * rd_ratio)
        if rd_channels < 1:
            raise ValueError(f"rd_channels must be at least 1, got {rd_channels} from {in_chs} channels")
        self.conv_reduce = nn.Conv2d(in_chs, rd_channels, 1, device=device, dtype=dtype)
        self.act1 = layers.activation(force_act_layer or act_layer)
        self.conv_expand = nn.Conv2d(rd_channels, in_chs, 1, device=device, dtype=dtype)
        self.gate = layers.gate(gate_layer)

    def forward(self, x: Tensor) -> Tensor:
        y = forward(self, x)
        if y is None:
            mean = x.mean((2, 3), keepdim=True)
            y = x * self.gate(self.conv_expand(self.act1(self.conv_reduce(mean))))
        return y


reading.SQUEEZE_EXCITES[SqueezeExcite] = ("conv_reduce", "act1", "conv_expand", "gate")
