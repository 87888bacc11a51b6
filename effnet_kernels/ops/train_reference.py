"""The kernels of a block in training in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.ops.activations import FUNCTIONS, GRADIENTS
from effnet_kernels.ops.common import to_nhwc, wide
from effnet_kernels.ops.train_block import Gone, Gradient, Layer, Norm, Source, Through


class Reference:
    """``block.Kernels``, one expression each; convolutions are ``wide``, as those of all references."""

    def conv(self, source: Source, layer: Layer, statistics: bool) -> tuple[Tensor, Tensor | None]:
        raw = self.convolve(self.apply(source, None), layer)
        return raw, self.statistics(raw) if statistics else None

    def convolve(self, a: Tensor, layer: Layer) -> Tensor:
        return convolve(wide(a), layer.wide()).to(a.dtype)

    def statistics(self, raw: Tensor) -> Tensor:
        var, mean = torch.var_mean(wide(raw), (0, 2, 3), correction=0)
        return torch.stack([mean, var])

    def norm(self, layer: Layer, statistics: Tensor) -> Norm:
        mean, var = statistics
        rstd = (var + layer.eps).rsqrt_()
        scale = layer.gamma * rstd  # in the wider dtype of the two
        return Norm(torch.stack([scale, layer.beta - mean * scale, mean, rstd]), layer.act)

    def pool(self, source: Source) -> Tensor:
        return activated(source).mean((2, 3))

    def apply(self, source: Source, residual: Tensor | None) -> Tensor:
        if source.norm is None and source.gate is None and residual is None:
            return source.raw
        y = activated(source)
        if residual is not None:
            y = y + residual
        return to_nhwc(y.to(source.raw.dtype))

    def moments(self, gradient: Gradient) -> Tensor:
        dz = behind_norm(gradient)
        xhat = 0.0 if gradient.raw is None else normalised(gradient.raw, gradient.norm)
        return torch.stack([dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))])

    def coefficients(self, norm: Norm, moments: Tensor | None, count: int) -> Tensor:
        scale, _, _, rstd = norm.vectors
        if moments is None:
            return torch.stack([scale, torch.zeros_like(scale), torch.zeros_like(scale)])
        r, q = moments * (scale * (-1.0 / count))
        return torch.stack([scale, q * rstd, r])

    def gate_moments(self, grad: Tensor, source: Source) -> Tensor:
        assert source.norm is not None
        z, grad = affine(source.raw, source.norm), wide(grad)
        slope = GRADIENTS[source.norm.act](torch.ones_like(z), z)
        xhat = normalised(source.raw, source.norm)
        terms = (grad * FUNCTIONS[source.norm.act](z), grad * slope, slope, grad * slope * xhat, slope * xhat)
        return torch.stack([t.sum((2, 3)) for t in terms])

    def conv_backward(self, through: Through) -> Gone:
        dy = self.raw_gradient(through.gradient, through.coefficients)
        a = self.apply(through.source, None) if through.weight and through.source is not None else None
        return self.convolve_backward(dy, a, through)

    def convolve_backward(self, dy: Tensor, a: Tensor | None, through: Through) -> Gone:
        gone = convolve_backward(wide(dy), None if a is None else wide(a), through._replace(layer=through.layer.wide()))
        assert not isinstance(gone.into, Gradient)
        return Gone(*(None if grad is None else grad.to(dy.dtype) for grad in (gone.into, gone.weight)))

    def raw_gradient(self, gradient: Gradient, coefficients: Tensor) -> Tensor:
        p, q, r = columns(coefficients)
        dy = p * behind_norm(gradient)
        if gradient.raw is not None:
            dy = dy + q * (wide(gradient.raw) - columns(gradient.norm.vectors)[2]) + r
        dtype = gradient.grad.dtype if gradient.grad is not None else gradient.raw.dtype  # type: ignore[union-attr]
        return to_nhwc(dy.to(dtype))


def columns(vectors: Tensor) -> Tensor:
    """[K, C] as K times [C, 1, 1]."""
    return vectors[:, :, None, None]


def affine(raw: Tensor, norm: Norm) -> Tensor:
    """``norm(raw)``, wide."""
    scale, shift, _, _ = columns(norm.vectors)
    return wide(raw) * scale + shift


def normalised(raw: Tensor, norm: Norm) -> Tensor:
    """``xhat``: the map with mean zero and variance one, wide."""
    _, _, mean, rstd = columns(norm.vectors)
    return (wide(raw) - mean) * rstd


def activated(source: Source) -> Tensor:
    """``act(norm(raw)) * gate``, wide."""
    y = wide(source.raw)
    if source.norm is not None:
        y = FUNCTIONS[source.norm.act](affine(source.raw, source.norm))
    return y if source.gate is None else y * source.gate[:, :, None, None]


def behind_norm(gradient: Gradient) -> Tensor:
    """``dz``, wide."""
    if gradient.grad is None:
        assert gradient.bias is not None
        dz = gradient.bias[:, :, None, None]
        if gradient.raw is not None:
            dz = dz.expand(gradient.raw.shape)
    else:
        dz = wide(gradient.grad)
        if gradient.gate is not None and gradient.bias is not None:
            dz = dz * gradient.gate[:, :, None, None] + gradient.bias[:, :, None, None]
    if gradient.act == "identity":
        return dz
    assert gradient.raw is not None
    return GRADIENTS[gradient.act](dz, affine(gradient.raw, gradient.norm))


def convolve(a: Tensor, layer: Layer) -> Tensor:
    """The convolution of a layer, dense channels-last."""
    a, padding = _padded(a, layer)
    return to_nhwc(F.conv2d(a, layer.weight, None, layer.stride, padding, 1, layer.groups(a.shape[1])))


def convolve_backward(dy: Tensor, a: Tensor | None, through: Through) -> Gone:
    """Gradients of the input, if wanted, and of the weight, where the input ``a`` is given."""
    layer, size, below = through.layer, through.size, through.below
    shape = dy.new_empty(1).expand(*size) if a is None else a
    shape, padding = _padded(shape, layer)
    da, dw, _ = torch.ops.aten.convolution_backward.default(
        dy, shape, layer.weight, None, layer.stride, padding, (1, 1), False, (0, 0), layer.groups(size[1]),
        (below, a is not None, False),
    )  # fmt: skip
    if below:
        top, _, left, _ = (0, 0, 0, 0) if any(padding) else layer.padding
        da = to_nhwc(da[:, :, top : top + size[2], left : left + size[3]])
    return Gone(da if below else None, dw.contiguous() if a is not None else None)


def _padded(a: Tensor, layer: Layer) -> tuple[Tensor, tuple[int, int]]:
    """The input and the padding left to the convolution: all of it, unless it is asymmetric."""
    top, bottom, left, right = layer.padding
    if top == bottom and left == right:
        return a, (top, left)
    return F.pad(a, (left, right, top, bottom)), (0, 0)
