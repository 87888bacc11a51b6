"""Convolutions in training that are not depthwise: torch's own matrix products and convolutions.

They get a copy of their input that is normalised, activated and gated, and give back the gradient of that copy. What a
native backend adds are passes over maps and the depthwise convolution, which takes its input as it is kept.
"""

import torch
from torch import Tensor

from effnet_kernels.ops.common import empty_nhwc
from effnet_kernels.ops.conv_block_train import reference
from effnet_kernels.ops.conv_block_train.layers import Gone, Layer, Source, Through


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
            assert layer.weight is not None
            raw = empty_nhwc(a, layer.weight.shape[0], *a.shape[2:])
            torch.mm(_rows(a), layer.weight.flatten(1).t(), out=_rows(raw))
        else:
            raw = reference.convolve(a, layer)
        return raw, self.statistics(raw) if statistics else None

    def conv_backward(self, through: Through) -> Gone:
        layer, source, size = through.layer, through.source, through.size
        assert layer.weight is not None
        if _depthwise(layer, size[1]):
            return self.depthwise_backward(
                through if source is None else through._replace(source=self._ungated(source))
            )
        dy = self.raw_gradient(through.gradient, through.coefficients)
        a = self.apply(source, None) if through.weight and source is not None else None
        if not layer.pointwise:
            return reference.convolve_backward(dy, a, through)
        da, dweight, rows = None, None, _rows(dy)
        if a is not None:
            dweight = torch.mm(rows.t(), _rows(a)).view(layer.weight.shape)
        if through.below:
            da = empty_nhwc(dy, *size[1:])
            torch.mm(rows, layer.weight.flatten(1), out=_rows(da))
        return Gone(da, dweight)

    def _ungated(self, source: Source) -> Source:
        """What has a gate behind it is no longer a norm alone: the map itself."""
        return source if source.gate is None else Source(self.apply(source, None))


def _depthwise(layer: Layer, channels: int) -> bool:
    """Whether the convolution has one filter per channel."""
    return layer.weight is not None and layer.weight.shape[:2] == (channels, 1) and channels > 1


def _rows(x: Tensor) -> Tensor:
    """A dense channels-last map as a matrix of [pixels, channels]."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
