"""The small layers that blocks are made of; same parameters, buffers and numbers as their namesakes in timm."""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "hardswish": nn.Hardswish,
    "hard_swish": nn.Hardswish,
}
_GATES: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
    "hard_sigmoid": nn.Hardsigmoid,
}

Layer = str | type[nn.Module]
NormLayer = type[nn.Module] | functools.partial[Any]


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """TensorFlow's "SAME": the padding before and after that leaves ``ceil(size / stride)`` outputs."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class Conv2dSame(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": by the input's size, one more behind than in front."""

    def forward(self, x: Tensor) -> Tensor:
        (kh, kw), (sh, sw), (dh, dw) = self.weight.shape[2:], self.stride, self.dilation
        top, bottom = same_padding(x.shape[-2], kh, sh, dh)
        left, right = same_padding(x.shape[-1], kw, sw, dw)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm2d with an activation behind it, child ``act``."""

    def __init__(self, num_features: int, act: nn.Module, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class DropPath(nn.Module):
    """Stochastic depth per sample (https://arxiv.org/abs/1603.09382): survivors are scaled by 1 / (1 - p)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        if keep > 0.0:
            mask.div_(keep)
        return x * mask


def conv2d(
    in_chs: int,
    out_chs: int,
    kernel_size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    pad_type: str | int = "",
    **factory: Any,
) -> nn.Conv2d:
    """A bias-free convolution; ``pad_type`` is '' (symmetric), 'same' (TensorFlow's) or a number of pixels."""
    _check_positive(in_chs=in_chs, out_chs=out_chs, kernel_size=kernel_size, stride=stride, dilation=dilation)
    conv: Callable[..., nn.Conv2d] = nn.Conv2d
    if isinstance(pad_type, int) and not isinstance(pad_type, bool) and pad_type >= 0:
        padding = pad_type
    elif pad_type in ("", "same"):
        padding = (stride - 1 + dilation * (kernel_size - 1)) // 2
        if pad_type == "same" and (stride > 1 or dilation * (kernel_size - 1) % 2):
            conv, padding = Conv2dSame, 0
    else:
        raise ValueError(f"pad_type must be '', 'same' or an int >= 0, got {pad_type!r}")
    return conv(in_chs, out_chs, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False, **factory)


def batch_norm_act(channels: int, act_layer: Layer, norm_layer: NormLayer, **factory: Any) -> BatchNormAct2d:
    """BatchNorm and activation; ``norm_layer`` is nn.BatchNorm2d or a functools.partial of it."""
    keywords: dict[str, Any] = {}
    if isinstance(norm_layer, functools.partial):
        norm_layer, keywords = norm_layer.func, norm_layer.keywords  # type: ignore[assignment]
    if norm_layer is not nn.BatchNorm2d:
        raise ValueError(f"norm_layer must be torch.nn.BatchNorm2d or a functools.partial of it, got {norm_layer!r}")
    return BatchNormAct2d(channels, activation(act_layer), **keywords, **factory)


def activation(layer: Layer) -> nn.Module:
    """An activation module from its name or class; ValueError if the ops do not have it."""
    return _layer("act_layer", layer, _ACTIVATIONS)


def gate(layer: Layer) -> nn.Module:
    """A gate module from its name or class; ValueError if the ops do not have it."""
    return _layer("gate_layer", layer, _GATES)


def drop_path(rate: float) -> nn.Module:
    """Stochastic depth, or Identity at rate 0."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"drop_path_rate must be in [0, 1), got {rate}")
    return DropPath(rate) if rate else nn.Identity()


def make_divisible(value: float, divisor: int = 8) -> int:
    """``value`` rounded to a multiple of ``divisor``, at least one, and never down by more than 10%."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def _layer(argument: str, layer: Layer, table: dict[str, type[nn.Module]]) -> nn.Module:
    found = table.get(layer) if isinstance(layer, str) else layer
    if found is None or found not in table.values():
        raise ValueError(f"{argument} must be one of {tuple(table)} or the torch.nn class of one, got {layer!r}")
    return found()


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")
