"""A block in training: its vocabulary, and forward and backward over the kernels of a backend.

A block is some layers, each ``raw = conv(input)``, ``output = act(norm(raw))``, with squeeze-and-excitation, where
there is any, on the input of the last one. Only raw maps are ever kept: whoever reads one normalises, activates and
gates it as it is loaded. Forward writes every raw map once and the output once. Backward goes through the layers in
reverse with one ``Gradient`` at a time, whose BatchNorm and activation are applied by whoever loads it.

BatchNorm backward (Ioffe and Szegedy, https://arxiv.org/abs/1502.03167), with xhat = (y - mean) * rstd over
P = N * H * W values and dz the gradient behind the norm:

    dbeta = sum dz,  dgamma = sum dz * xhat,  dy = gamma * rstd * (dz - dbeta / P - xhat * dgamma / P)

which is ``p * dz + q * (y - mean) + r`` with three vectors. With running statistics q and r are zero.

Squeeze-and-excitation makes dz = (da * gate + bias) * act'(z), where ``bias``, the gradient of the pooled mean, is
known only after a pass over the whole image. But both sums are linear in gate and bias:

    sum dz = sum over n of gate[n] * sum da * act'  +  bias[n] * sum act'

so the pass that gives the gradient of the gate gives these sums too, per image, and no other pass is needed.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.arguments import SqueezeExciteWeights
from effnet_kernels.ops.activations import FUNCTIONS, GRADIENTS
from effnet_kernels.ops.common import conv_output_size, to_nhwc, wide


class Layer(NamedTuple):
    """One convolution with its BatchNorm and activation."""

    weight: Tensor  # [O, I, KH, KW], depthwise if I is 1 and the input has more channels
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
        return self.weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0, 0, 0)

    def wide(self) -> "Layer":
        """With the weight in ``wide`` precision."""
        return self._replace(weight=wide(self.weight))

    def groups(self, channels: int) -> int:
        """Groups of the convolution over this many input channels."""
        return 1 if self.weight.shape[1] == channels else channels

    def output_size(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """[N, C, H, W] of the raw map from that of the input."""
        return size[0], self.weight.shape[0], *conv_output_size(size, self.weight, self.stride, self.padding)


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


class NeedsInputGrad(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weights: Sequence[bool]  # one per layer
    gammas: Sequence[bool]
    betas: Sequence[bool]
    se: Sequence[bool]  # none, or one per tensor


class Work(NamedTuple):
    """What backward has to do and, from that, what forward has to keep."""

    below: list[bool]  # [i]: whether something below the convolution of layer i wants a gradient
    norm: list[bool]  # [i]: whether backward has to come to the norm of layer i
    x: bool  # whether backward has anything to do: second derivatives start from x
    raws: list[bool]


def work(layers: Sequence[Layer], needs: NeedsInputGrad, excited: bool, pooled: bool) -> Work:
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
    return Work(below, norm, wanted, raws)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics, gates and sums for maps like x."""
    return wide(x.new_empty(0)).dtype


class Kernels(Protocol):
    """What a backend provides. Maps are dense channels-last; vectors, means, gates and sums are wide."""

    def conv(self, source: Source, layer: Layer, statistics: bool) -> tuple[Tensor, Tensor | None]:
        """The raw map of a layer and, on request, its [2, C] mean and (biased) variance over N, H and W."""

    def statistics(self, raw: Tensor) -> Tensor:
        """[2, C] mean and (biased) variance of a map."""

    def norm(self, layer: Layer, statistics: Tensor) -> Norm:
        """The norm of a layer with these statistics, [2, C]."""

    def pool(self, source: Source) -> Tensor:
        """[N, C] means over H and W."""

    def apply(self, source: Source, residual: Tensor | None) -> Tensor:
        """The map itself, plus ``residual``."""

    def moments(self, gradient: Gradient) -> Tensor:
        """[2, C] ``sum dz`` and ``sum dz * xhat``."""

    def coefficients(self, norm: Norm, moments: Tensor | None, count: int) -> Tensor:
        """[3, C] p, q, r over ``count`` values per channel; without moments for running statistics."""

    def gate_moments(self, grad: Tensor, source: Source) -> Tensor:
        """[5, N, C] sums over H and W, with ``grad`` the gradient of ``a * gate`` and a = act(z):

        ``grad * a``, ``grad * act'``, ``act'``, ``grad * act' * xhat``, ``act' * xhat``.
        """

    def conv_backward(self, through: Through) -> Gone:
        """Through a convolution, for what is wanted of it."""

    def raw_gradient(self, gradient: Gradient, coefficients: Tensor) -> Tensor:
        """The gradient of the raw map."""


def forward(
    k: Kernels, x: Tensor, layers: Sequence[Layer], se: SqueezeExciteWeights | None, residual: Tensor | None, pool: bool
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Output, raw maps, [2, C] statistics of each, and [mean, gate] of squeeze-and-excitation."""
    wide = accumulate_dtype(x)
    source, raws, statistics, squeezed = Source(x), [], [], []
    for i, layer in enumerate(layers):
        if se is not None and i == len(layers) - 1:
            mean = k.pool(source)
            gate = squeeze(mean, se)[-1]
            squeezed = [mean, gate]
            source = source._replace(gate=gate)
        raw, measured = k.conv(source, layer, not layer.frozen)
        raws.append(raw)
        if measured is None:
            measured = torch.stack([layer.running_mean, layer.running_var]).to(wide)
        statistics.append(measured)
        source = Source(raw, k.norm(layer, measured))
    if pool:
        return k.pool(source).to(x.dtype), raws, statistics, squeezed
    return k.apply(source, residual), raws, statistics, squeezed


class Saved(NamedTuple):
    """What forward keeps for backward; None where that is not needed."""

    x: Tensor | None
    raws: Sequence[Tensor | None]
    statistics: Sequence[Tensor]
    squeezed: Sequence[Tensor]  # pooled mean and gate, or nothing


def _flat(se: SqueezeExciteWeights, dtype: torch.dtype) -> list[Tensor]:
    """The weights as matrices and vectors of ``dtype``."""
    flat = [w.flatten(1) if w.dim() == 4 else w for w in se[:4]]
    return [w if w.dtype == dtype else w.to(dtype) for w in flat]


def squeeze(mean: Tensor, se: SqueezeExciteWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduced and activated, then expanded and gated."""
    w_reduce, b_reduce, w_expand, b_expand = _flat(se, mean.dtype)
    reduced = F.linear(mean, w_reduce, b_reduce)
    hidden = FUNCTIONS[se.act](reduced)
    expanded = F.linear(hidden, w_expand, b_expand)
    return reduced, hidden, expanded, FUNCTIONS[se.gate](expanded)


def squeeze_backward(grad: Tensor, mean: Tensor, se: SqueezeExciteWeights) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the pooled mean and of the four weights from that of the gate, [N, C]."""
    w_reduce, _, w_expand, _ = _flat(se, mean.dtype)
    reduced, hidden, expanded, _ = squeeze(mean, se)
    grad = GRADIENTS[se.gate](grad, expanded)
    grad_hidden = GRADIENTS[se.act](grad @ w_expand, reduced)
    grads = [grad_hidden.t() @ mean, grad_hidden.sum(0), grad.t() @ hidden, grad.sum(0)]
    return grad_hidden @ w_reduce, [g.view(w.shape).to(w.dtype) for g, w in zip(grads, se[:4], strict=True)]


def backward(
    k: Kernels,
    grad: Tensor,
    saved: Saved,
    layers: Sequence[Layer],
    se: SqueezeExciteWeights | None,
    pool: bool,
    size: Sequence[int],
    needs: NeedsInputGrad,
) -> list[Tensor]:
    """The wanted gradients in the order of ``NeedsInputGrad``, contiguous; ``size`` is the shape of x.

    That of the residual is ``grad`` itself.
    """
    last = len(layers) - 1
    todo = work(layers, needs, se is not None, pool)
    norms = [k.norm(layer, statistics) for layer, statistics in zip(layers, saved.statistics, strict=True)]
    sizes = [tuple(size)]
    for layer in layers:
        sizes.append(layer.output_size(sizes[-1]))
    raws = saved.raws
    mean, gate = saved.squeezed or (None, None)

    def at(i: int, grad: Tensor, gate: Tensor | None = None, bias: Tensor | None = None) -> Gradient:
        """A gradient of the output of layer i that backward made."""
        return Gradient(grad, raws[i], norms[i], layers[i].act, gate, bias, owned=True)

    if pool:
        bias = grad.to(norms[last].vectors.dtype) / (sizes[-1][2] * sizes[-1][3])
        current = Gradient(None, raws[last], norms[last], layers[last].act, bias=bias)
    else:
        current = at(last, to_nhwc(grad))._replace(owned=False)
    found: dict[tuple[str, int], Tensor] = {}
    moments: Tensor | None = None
    for i in range(last, -1, -1):
        layer, through = layers[i], todo.below[i] or needs.weights[i]
        if not todo.norm[i]:
            break
        if moments is None and (needs.gammas[i] or needs.betas[i] or (through and not layer.frozen)):
            moments = k.moments(current)
        if moments is not None:
            found["gamma", i] = moments[1].to(layer.gamma.dtype)
            found["beta", i] = moments[0].to(layer.beta.dtype)
        if not through:
            break
        n, _, height, width = sizes[i + 1]
        coefficients = k.coefficients(norms[i], None if layer.frozen else moments, n * height * width)
        gated = i == last and se is not None
        raw = raws[i - 1] if i > 0 else saved.x
        source = None if raw is None else Source(raw, norms[i - 1] if i > 0 else None, gate if gated else None)
        into, weight, moments = k.conv_backward(
            Through(current, coefficients, source, layer, sizes[i], todo.below[i], needs.weights[i])
        )
        if weight is not None:
            found["weight", i] = weight
        if into is None:
            break
        if isinstance(into, Gradient):
            current = into
        elif i == 0:
            found["x", 0] = into
        elif gated:
            assert source is not None
            assert se is not None
            assert mean is not None
            assert gate is not None
            sums = k.gate_moments(into, source)
            grad_mean, grads = squeeze_backward(sums[0], mean, se)
            found.update({("se", j): g for j, g in enumerate(grads)})
            bias = grad_mean / (sizes[i][2] * sizes[i][3])
            moments = (gate * sums[1::2] + bias * sums[2::2]).sum(1)
            current = at(i - 1, into, gate, bias)
        else:
            current = at(i - 1, into)
    order = [
        ("x", [needs.x]),
        ("weight", needs.weights),
        ("gamma", needs.gammas),
        ("beta", needs.betas),
        ("se", needs.se),
    ]
    return [found[name, i] for name, wanted in order for i, want in enumerate(wanted) if want]
