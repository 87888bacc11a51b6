"""Products of bfloat16 in float32, on a processor without instructions for it: two to four times as fast as torch's.

They run over a strip of the map at a time: its float32 copies stay in cache and cost no memory to speak of. Sums are
float32 and rounded once, as torch's are.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from effnet_kernels.ops.common import empty_nhwc
from effnet_kernels.ops.conv_block_train import reference
from effnet_kernels.ops.conv_block_train.layers import Gone, Layer, Through

STRIP = 1 << 19  # values in the copies of a strip, input and output together: 2 MB


def pays(x: Tensor) -> bool:
    """Whether products of this map are faster here."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not _has_instructions()


@functools.cache
def _has_instructions() -> bool:
    can = torch.cpu.get_capabilities()
    return can.get("architecture") != "x86_64" or can.get("avx512_bf16", False) or can.get("amx_bf16", False)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``; ``a`` has a row per pixel."""
    b = b.float()
    for a_strip, out_strip in _strips(a, out):
        out_strip.copy_(torch.mm(a_strip.float(), b))


def multiply_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``; both have a row per pixel."""
    out = a.new_zeros((a.shape[1], b.shape[1]), dtype=torch.float32)
    for a_strip, b_strip in _strips(a, b):
        out.addmm_(a_strip.float().t(), b_strip.float())
    return out.to(a.dtype)


def convolve(a: Tensor, layer: Layer) -> Tensor:
    """``reference.convolve``."""
    out, layer = empty_nhwc(a, *layer.output_size(a.shape)[1:]), _float32(layer)
    for a_strip, out_strip in _strips(a, out):
        out_strip.copy_(reference.convolve(a_strip.float(), layer))
    return out


def convolve_backward(dy: Tensor, a: Tensor | None, through: Through) -> Gone:
    """``reference.convolve_backward``."""
    size, layer = through.size, _float32(through.layer)
    assert layer.weight is not None
    da = empty_nhwc(dy, *size[1:])
    dweight = torch.zeros_like(layer.weight, memory_format=torch.contiguous_format)
    for dy_strip, a_strip, da_strip in _strips(dy, da if a is None else a, da):
        part = through._replace(layer=layer, size=dy_strip.shape[:1] + size[1:])
        gone = reference.convolve_backward(dy_strip.float(), None if a is None else a_strip.float(), part)
        if isinstance(gone.into, Tensor):
            da_strip.copy_(gone.into)
        if gone.weight is not None:
            dweight += gone.weight
    return Gone(da if through.below else None, None if a is None else dweight.to(dy.dtype))


def _float32(layer: Layer) -> Layer:
    assert layer.weight is not None
    return layer._replace(weight=layer.weight.float())


def _strips(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of tensors of the same length, side by side: as many rows or images as ``STRIP`` allows, one at least."""
    length = tensors[0].shape[0]
    values = max(1, sum(x.numel() for x in tensors))
    return zip(*(x.split(max(1, STRIP * length // values)) for x in tensors), strict=True)
