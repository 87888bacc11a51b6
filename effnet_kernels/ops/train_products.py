"""Convolutions in training that are not depthwise: torch's own matrix products and convolutions.

They get a copy of their input that is normalised, activated and gated, and give back the gradient of that copy. What a
native backend adds are passes over maps and the depthwise convolution, which takes its input as it is kept. Products of
bfloat16 run in float32 on a processor that has no instructions for them (train_widened.py).
"""

import torch
from torch import Tensor

from effnet_kernels.ops import train_reference as reference
from effnet_kernels.ops import train_widened as widened
from effnet_kernels.ops.common import empty_nhwc
from effnet_kernels.ops.train_block import Gone, Layer, Source, Through


class Products(reference.Reference):
    """``block.Kernels`` for a backend with passes over maps; ``depthwise`` and its backward never see a gate."""

    def depthwise(self, source: Source, layer: Layer, statistics: bool) -> tuple[Tensor, Tensor | None]:
        """``conv`` of a depthwise layer."""
        raise NotImplementedError

    def depthwise_backward(self, through: Through) -> Gone:
        """``conv_backward`` of a depthwise layer."""
        raise NotImplementedError

    def conv(self, source: Source, layer: Layer, statistics: bool) -> tuple[Tensor, Tensor | None]:
        if _depthwise(layer, source.raw.shape[1]):
            return self.depthwise(self._ungated(source), layer, statistics)
        a = self.apply(source, None)
        if layer.pointwise:
            raw = empty_nhwc(a, layer.weight.shape[0], *a.shape[2:])
            _multiply(_rows(a), layer.weight.flatten(1).t(), _rows(raw))
        else:
            raw = (widened if widened.pays(a) else reference).convolve(a, layer)
        return raw, self.statistics(raw) if statistics else None

    def conv_backward(self, through: Through) -> Gone:
        layer, source, size = through.layer, through.source, through.size
        if _depthwise(layer, size[1]):
            return self.depthwise_backward(
                through if source is None else through._replace(source=self._ungated(source))
            )
        dy = self.raw_gradient(through.gradient, through.coefficients)
        a = self.apply(source, None) if through.weight and source is not None else None
        if not layer.pointwise:
            return (widened if widened.pays(dy) else reference).convolve_backward(dy, a, through)
        da, dweight, rows = None, None, _rows(dy)
        if a is not None:
            dweight = _multiply_over_rows(rows, _rows(a)).view(layer.weight.shape)
        if through.below:
            da = empty_nhwc(dy, *size[1:])
            _multiply(rows, layer.weight.flatten(1), _rows(da))
        return Gone(da, dweight)

    def _ungated(self, source: Source) -> Source:
        """What has a gate behind it is no longer a norm alone: the map itself."""
        return source if source.gate is None else Source(self.apply(source, None))


def _depthwise(layer: Layer, channels: int) -> bool:
    """Whether the convolution has one filter per channel."""
    return layer.weight.shape[:2] == (channels, 1) and channels > 1


def _rows(x: Tensor) -> Tensor:
    """A dense channels-last map as a matrix of [pixels, channels]."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if widened.pays(a):
        widened.multiply(a, b, out)
    else:
        torch.mm(a, b, out=out)


def _multiply_over_rows(a: Tensor, b: Tensor) -> Tensor:
    return widened.multiply_over_rows(a, b) if widened.pays(a) else torch.mm(a.t(), b)
