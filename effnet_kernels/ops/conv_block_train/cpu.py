"""The kernels of a block in training on the CPU: csrc/cpu/train_*.h, and torch's own matrix products."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.backends import Problem
from effnet_kernels.ops.common import empty_nhwc
from effnet_kernels.ops.conv_block_train.layers import Gradient, Layer, Source
from effnet_kernels.ops.conv_block_train.products import Products
from effnet_kernels.ops.native_cpu import DTYPES

_native = torch.ops.effnet_kernels_cpu
_train_statistics = _native.train_statistics.default
_train_pool = _native.train_pool.default
_train_apply = _native.train_apply.default
_train_moments = _native.train_moments.default
_train_gate_moments = _native.train_gate_moments.default
_train_raw_gradient = _native.train_raw_gradient.default
_train_depthwise = _native.train_depthwise.default
_train_depthwise_backward = _native.train_depthwise_backward.default


class Native(Products):
    """``block.Kernels``."""

    def depthwise(self, source: Source, layer: Layer, statistics: bool) -> tuple[Tensor, Tensor | None]:
        assert layer.weight is not None
        raw = empty_nhwc(source.raw, *layer.output_size(source.raw.shape)[1:])
        measured = _floats(raw, 2, raw.shape[1]) if statistics else None
        _train_depthwise(raw, measured, source.raw, *_norm(source), layer.weight, layer.stride, layer.padding)
        return raw, measured

    def statistics(self, raw: Tensor) -> Tensor:
        out = _floats(raw, 2, raw.shape[1])
        _train_statistics(out, raw)
        return out

    def pool(self, source: Source) -> Tensor:
        out = _floats(source.raw, *source.raw.shape[:2])
        _train_pool(out, source.raw, *_norm(source))
        return out

    def apply(self, source: Source, residual: Tensor | None) -> Tensor:
        if source.norm is None and source.gate is None and residual is None:
            return source.raw
        out = torch.empty_like(source.raw)
        _train_apply(out, source.raw, *_norm(source), source.gate, residual)
        return out

    def moments(self, gradient: Gradient) -> Tensor:
        vectors = gradient.norm.vectors
        out = torch.empty_like(vectors[:2])
        _train_moments(out, *_gradient(gradient))
        return out

    def gate_moments(self, grad: Tensor, source: Source) -> Tensor:
        out = _floats(grad, 5, *grad.shape[:2])
        _train_gate_moments(out, grad, source.raw, *_norm(source))
        return out

    def depthwise_backward(
        self,
        gradient: Gradient,
        coefficients: Tensor,
        source: Source | None,
        layer: Layer,
        size: Sequence[int],
        below: bool,
        weight: bool,
    ) -> tuple[Gradient | Tensor | None, Tensor | None, Tensor | None]:
        assert layer.weight is not None
        dx = empty_nhwc(coefficients.new_empty(size[0], dtype=layer.weight.dtype), *size[1:]) if below else None
        dweight = _floats(coefficients, *layer.weight.shape) if weight else None
        norm = None if source is None else source.norm
        moments = _floats(coefficients, 2, size[1]) if below and norm is not None else None
        x, x_norm = (None, (None, "identity")) if source is None else (source.raw, _norm(source))
        _train_depthwise_backward(
            dx,
            dweight,
            moments,
            *_gradient(gradient),
            coefficients,
            x,
            *x_norm,
            layer.weight,
            layer.stride,
            layer.padding,
        )
        into: Gradient | Tensor | None = dx
        if dx is not None and norm is not None and source is not None:
            into = Gradient(dx, source.raw, norm, "identity", owned=True)
        return into, None if dweight is None else dweight.to(layer.weight.dtype), moments

    def raw_gradient(self, gradient: Gradient, coefficients: Tensor) -> Tensor:
        out = gradient.grad if gradient.owned else None
        if out is None:
            out = torch.empty_like(gradient.raw if gradient.raw is not None else gradient.grad)  # type: ignore[arg-type]
        _train_raw_gradient(out, *_gradient(gradient), coefficients)
        return out


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _norm(source: Source) -> tuple[Tensor | None, str]:
    return (None, "identity") if source.norm is None else (source.norm.vectors, source.norm.act)


def _gradient(g: Gradient) -> tuple[Any, ...]:
    return g.grad, g.raw, g.norm.vectors, g.act, g.gate, g.bias


def supports(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cpu":
        return False, f"the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return False, "only float32 and bfloat16 have CPU kernels"
    return True, "any shape"


def run(step: Callable[..., Any], *args: Any) -> Any:
    """``block.forward`` or ``block.backward`` on these kernels."""
    return step(Native(), *args)
