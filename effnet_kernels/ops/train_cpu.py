"""The kernels of a block in training on the CPU: csrc/cpu/train_*.h, and torch's own matrix products."""

from typing import Any

import torch
from torch import Tensor

from effnet_kernels.ops.common import empty_nhwc
from effnet_kernels.ops.train_block import Gone, Gradient, Layer, Norm, Source, Through
from effnet_kernels.ops.train_products import Products

_native = torch.ops.effnet_kernels_cpu


class Native(Products):
    """``block.Kernels``."""

    def depthwise(self, source: Source, layer: Layer, statistics: bool) -> tuple[Tensor, Tensor | None]:
        raw = empty_nhwc(source.raw, *layer.output_size(source.raw.shape)[1:])
        measured = _floats(raw, 2, raw.shape[1]) if statistics else None
        _native.train_depthwise.default(
            raw, measured, source.raw, *_norm(source.norm), layer.weight, layer.stride, layer.padding
        )
        return raw, measured

    def statistics(self, raw: Tensor) -> Tensor:
        out = _floats(raw, 2, raw.shape[1])
        _native.train_statistics.default(out, raw)
        return out

    def norm(self, layer: Layer, statistics: Tensor) -> Norm:
        out = _floats(statistics, 4, statistics.shape[1])
        _native.train_norm.default(out, statistics, layer.gamma, layer.beta, layer.eps)
        return Norm(out, layer.act)

    def pool(self, source: Source) -> Tensor:
        out = _floats(source.raw, *source.raw.shape[:2])
        _native.train_pool.default(out, source.raw, *_norm(source.norm))
        return out

    def apply(self, source: Source, residual: Tensor | None) -> Tensor:
        if source.norm is None and source.gate is None and residual is None:
            return source.raw
        out = torch.empty_like(source.raw)
        _native.train_apply.default(out, source.raw, *_norm(source.norm), source.gate, residual)
        return out

    def moments(self, gradient: Gradient) -> Tensor:
        vectors = gradient.norm.vectors
        out = torch.empty_like(vectors[:2])
        _native.train_moments.default(out, *_gradient(gradient))
        return out

    def coefficients(self, norm: Norm, moments: Tensor | None, count: int) -> Tensor:
        if moments is None:
            return super().coefficients(norm, moments, count)
        out = torch.empty_like(norm.vectors[:3])
        _native.train_coefficients.default(out, norm.vectors, moments, count)
        return out

    def gate_moments(self, grad: Tensor, source: Source) -> Tensor:
        out = _floats(grad, 5, *grad.shape[:2])
        _native.train_gate_moments.default(out, grad, source.raw, *_norm(source.norm))
        return out

    def depthwise_backward(self, through: Through) -> Gone:
        layer, source, w = through.layer, through.source, through.layer.weight
        size, vectors = through.size, through.gradient.norm.vectors
        dx = empty_nhwc(w.new_empty(size[0]), *size[1:]) if through.below else None
        dweight = _floats(vectors, *w.shape) if through.weight else None
        norm = None if source is None else source.norm
        moments = None if dx is None or norm is None else torch.empty_like(vectors[:2])
        _native.train_depthwise_backward.default(
            dx, dweight, moments, *_gradient(through.gradient), through.coefficients,
            None if source is None else source.raw, *_norm(norm), w, layer.stride, layer.padding,
        )  # fmt: skip
        if dweight is not None:
            dweight = dweight.to(w.dtype)
        if dx is None or norm is None or source is None:
            return Gone(dx, dweight)
        return Gone(Gradient(dx, source.raw, norm, "identity", owned=True), dweight, moments)

    def raw_gradient(self, gradient: Gradient, coefficients: Tensor) -> Tensor:
        out = gradient.grad if gradient.owned else None
        if out is None:
            out = torch.empty_like(gradient.raw if gradient.raw is not None else gradient.grad)  # type: ignore[arg-type]
        _native.train_raw_gradient.default(out, *_gradient(gradient), coefficients)
        return out


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _norm(norm: Norm | None) -> tuple[Tensor | None, str]:
    return (None, "identity") if norm is None else (norm.vectors, norm.act)


def _gradient(g: Gradient) -> tuple[Any, ...]:
    return g.grad, g.raw, g.norm.vectors, g.act, g.gate, g.bias
