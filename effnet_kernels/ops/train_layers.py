"""The vocabulary of a block in training, and what its backward has to keep and to compute.

A block is a chain of layers, each ``raw = conv(input)``, ``output = act(norm(raw))``, with
squeeze-and-excitation, where there is any, on the input of the last one. Only raw maps are ever kept:
whoever reads one normalises, activates and gates it as it is loaded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_kernels.ops.common import conv_output_size, wide


class Layer(NamedTuple):
    """One convolution with its BatchNorm and activation."""

    weight: Tensor | None  # [O, I, KH, KW], depthwise if I is 1 and the input has more channels; None: no convolution
    gamma: Tensor  # [O]
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float
    frozen: bool  # normalise by the running statistics, as BatchNorm in eval mode
    act: str
    stride: tuple[int, int]  # (vertical, horizontal)
    padding: tuple[int, int, int, int]  # (top, bottom, left, right)

    @property
    def pointwise(self) -> bool:
        """Whether the convolution is a product of matrices."""
        w = self.weight
        return w is not None and w.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0, 0, 0)

    def wide(self) -> "Layer":
        """With the weight in ``wide`` precision."""
        return self if self.weight is None else self._replace(weight=wide(self.weight))

    def groups(self, channels: int) -> int:
        """Groups of the convolution over this many input channels."""
        return 1 if self.weight is None or self.weight.shape[1] == channels else channels

    def output_size(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """[N, C, H, W] of the raw map from that of the input."""
        n, c, h, w = size
        if self.weight is None:
            return n, c, h, w
        return n, self.weight.shape[0], *conv_output_size(size, self.weight, self.stride, self.padding)


class Norm(NamedTuple):
    """BatchNorm and activation on a raw map."""

    vectors: Tensor  # [4, C], wide: scale, shift, mean, rstd; norm(y) = y * scale + shift
    act: str


class Source(NamedTuple):
    """A map as its consumer sees it: ``act(norm(raw)) * gate``."""

    raw: Tensor  # [N, C, H, W], dense channels-last
    norm: Norm | None = None
    gate: Tensor | None = None  # [N, C], wide


class Gradient(NamedTuple):
    """The gradient at the normalised map ``z``: ``(grad * gate + bias) * act'(z)``."""

    grad: Tensor | None  # [N, C, H, W]; None: zero
    raw: Tensor | None  # [N, C, H, W]; None where neither act' nor the statistics need it
    norm: Norm
    act: str  # identity where ``grad`` has act'(z) in it
    gate: Tensor | None = None  # [N, C], wide
    bias: Tensor | None = None  # [N, C], wide: what a mean over the map gives back to each of its pixels
    owned: bool = False  # ``grad`` was made on the way and may be overwritten


class Through(NamedTuple):
    """The way back through a convolution: what is known, and what is wanted."""

    gradient: Gradient  # at its normalised output
    coefficients: Tensor  # [3, C], wide: p, q, r; that of the raw output is ``p * dz + q * (y - mean) + r``
    source: Source | None  # its input; None where that is not needed
    layer: Layer
    size: tuple[int, ...]  # [N, C, H, W] of its input
    below: bool  # whether the gradient of its input is wanted
    weight: bool  # whether that of its weight is


class Gone(NamedTuple):
    """What came of going ``Through``."""

    into: Gradient | Tensor | None  # at the input: a map, or a ``Gradient`` where that is normalised but not gated
    weight: Tensor | None = None
    moments: Tensor | None = None  # of ``into``, only where it is a ``Gradient``


class SqueezeExcite(NamedTuple):
    """The two fully connected layers of squeeze-and-excitation."""

    weights: Sequence[Tensor]  # w_reduce [R, C, 1, 1], b_reduce [R], w_expand [C, R, 1, 1], b_expand [C]
    act: str
    gate: str

    def flat(self, dtype: torch.dtype) -> list[Tensor]:
        """The weights as matrices and vectors of ``dtype``."""
        flat = [w.flatten(1) if w.dim() == 4 else w for w in self.weights]
        return [w if w.dtype == dtype else w.to(dtype) for w in flat]


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weights: Sequence[bool]  # one per layer; False without convolution
    gammas: Sequence[bool]
    betas: Sequence[bool]
    se: Sequence[bool]  # none, or one per tensor


class Work(NamedTuple):
    """What backward has to do and, from that, what forward has to keep."""

    below: list[bool]  # [i]: whether something below the convolution of layer i wants a gradient
    norm: list[bool]  # [i]: whether backward has to come to the norm of layer i
    x: bool  # whether backward has anything to do: second derivatives start from x
    raws: list[bool]


def work(layers: Sequence[Layer], needs: Needs, excited: bool, pooled: bool) -> Work:
    """The least that gives the wanted gradients; ``excited``: there is squeeze-and-excitation."""
    last = len(layers) - 1
    below, norm, raws = [], [], []
    wanted = needs.x
    for i in range(len(layers)):
        if i == last:
            wanted = wanted or any(needs.se)
        below.append(wanted)
        norm.append(wanted or needs.weights[i] or needs.gammas[i] or needs.betas[i])
        wanted = norm[i]
    for i, layer in enumerate(layers):
        through = below[i] or needs.weights[i]  # the gradient of the raw map itself is wanted
        raw = needs.gammas[i] or (through and not layer.frozen) or (norm[i] and layer.act != "identity")
        if i < last:
            raw = raw or needs.weights[i + 1]
        if i == last - 1 and excited:
            raw = raw or below[last]
        if i == last and pooled:  # the gradient has no map of its own
            raw = raw or norm[i]
        raws.append(raw)
    if layers[0].weight is None:  # the raw map of the first layer is x
        raws[0] = False
    return Work(below, norm, wanted, raws)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics, gates and sums for maps like x."""
    return wide(x.new_empty(0)).dtype
