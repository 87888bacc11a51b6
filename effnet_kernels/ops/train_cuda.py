"""The kernels of a block in training in CUDA C++: csrc/cuda/train_depthwise*.cu. All others are the reference's, with
torch's own convolutions in the dtype of the map (emulated on a processor that sums bfloat16 badly, widened ones).
"""

import torch
from torch import Tensor

from effnet_kernels.ops import train_reference as reference
from effnet_kernels.ops import train_widened as widened
from effnet_kernels.ops.common import empty_nhwc
from effnet_kernels.ops.native_cuda import KERNELS, STRIDES
from effnet_kernels.ops.train_block import Gone, Gradient, Layer, Source, Through

_native = torch.ops.effnet_kernels_cuda


class Native(reference.Reference):
    """``block.Kernels``: depthwise convolutions read maps as they are kept."""

    def conv(self, source: Source, layer: Layer, statistics: bool) -> tuple[Tensor, Tensor | None]:
        """As ``block.Kernels``; other windows than the compiled ones, and gated inputs, are the reference's."""
        x, norm = source.raw, source.norm
        if not _compiled(layer, x.shape[1]) or source.gate is not None or (statistics and x.numel() == 0):
            return super().conv(source, layer, statistics)
        raw = empty_nhwc(x, *layer.output_size(x.shape)[1:])
        measured = x.new_empty((2, x.shape[1]), dtype=torch.float32) if statistics else None
        _native.train_depthwise.default(
            raw, measured, x, None if norm is None else norm.vectors, "identity" if norm is None else norm.act,
            layer.weight.contiguous(), layer.stride, layer.padding,
        )  # fmt: skip
        return raw, measured

    def convolve(self, a: Tensor, layer: Layer) -> Tensor:
        return (widened if widened.pays(a) else reference).convolve(a, layer)

    def convolve_backward(self, dy: Tensor, a: Tensor | None, through: Through) -> Gone:
        return (widened if widened.pays(dy) else reference).convolve_backward(dy, a, through)

    def conv_backward(self, through: Through) -> Gone:
        """As ``block.Kernels``; other windows than the compiled ones, and gated inputs, are the reference's."""
        layer, source, size = through.layer, through.source, through.size
        if not _compiled(layer, size[1]) or (source is not None and source.gate is not None):
            return super().conv_backward(through)
        gradient, w = through.gradient, layer.weight.contiguous()
        dx = empty_nhwc(w.new_empty(size[0]), *size[1:]) if through.below else None
        dweight = torch.empty_like(w) if through.weight else None
        norm = None if source is None else source.norm
        moments = None if dx is None or norm is None else torch.empty_like(norm.vectors[:2])
        _native.train_depthwise_backward.default(
            dx, dweight, moments, gradient.grad, gradient.raw, gradient.norm.vectors, gradient.act, gradient.gate,
            gradient.bias, through.coefficients, None if source is None else source.raw,
            None if norm is None else norm.vectors, "identity" if norm is None else norm.act,
            w, size, layer.stride, layer.padding,
        )  # fmt: skip
        if dx is None or norm is None or source is None:
            return Gone(dx, dweight)
        return Gone(Gradient(dx, source.raw, norm, "identity", owned=True), dweight, moments)


def _compiled(layer: Layer, channels: int) -> bool:
    """Whether the convolution is depthwise with a window that there is a kernel for."""
    w = layer.weight
    return w.shape[:2] == (channels, 1) and channels > 1 and tuple(w.shape[2:]) in KERNELS and layer.stride in STRIDES
