"""A block in training in Triton, and torch's own matrix products."""

from torch import Tensor

from effnet_kernels.ops import train_depthwise_triton as depthwise
from effnet_kernels.ops import train_maps_triton as maps
from effnet_kernels.ops.train_block import Gone, Gradient, Source, Through
from effnet_kernels.ops.train_products import Products


class Kernels(Products):
    """``block.Kernels``."""

    statistics = staticmethod(maps.statistics)
    pool = staticmethod(maps.pool)
    moments = staticmethod(maps.moments)
    gate_moments = staticmethod(maps.gate_moments)
    raw_gradient = staticmethod(maps.raw_gradient)
    depthwise = staticmethod(depthwise.forward)

    def apply(self, source: Source, residual: Tensor | None) -> Tensor:
        if source.norm is None and source.gate is None and residual is None:
            return source.raw
        return maps.apply(source, residual)

    def depthwise_backward(self, through: Through) -> Gone:
        layer, source = through.layer, through.source
        dy = maps.raw_gradient(through.gradient, through.coefficients)
        dweight = depthwise.weight_gradient(dy, source, layer) if through.weight and source is not None else None
        if not through.below:
            return Gone(None, dweight)
        dx, moments = depthwise.input_gradient(dy, source, layer, through.size)
        if source is None or source.norm is None:
            return Gone(dx, dweight)
        return Gone(Gradient(dx, source.raw, source.norm, "identity", owned=True), dweight, moments)


run = Kernels()
