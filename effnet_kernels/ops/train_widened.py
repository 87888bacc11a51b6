"""Products of bfloat16 in float32, on a processor without instructions for it: two to four times as fast as torch's.

They run over a strip of the map at a time: its float32 copies stay in cache and cost no memory to speak of. Sums are
float32 and rounded once, as torch's are.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from effnet_kernels.ops import train_reference as reference
from effnet_kernels.ops.common import empty_nhwc
from effnet_kernels.ops.train_block import Gone, Layer, Through

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
    for strip in _strips(a, out):
        out[strip] = torch.mm(a[strip].float(), b)


def multiply_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``; both have a row per pixel."""
    out = a.new_zeros((a.shape[1], b.shape[1]), dtype=torch.float32)
    for strip in _strips(a, b):
        out.addmm_(a[strip].float().t(), b[strip].float())
    return out.to(a.dtype)


def convolve(a: Tensor, layer: Layer) -> Tensor:
    """``reference.convolve``."""
    out, layer = empty_nhwc(a, *layer.output_size(a.shape)[1:]), layer.wide()
    for strip in _strips(a, out):
        out[strip] = reference.convolve(a[strip].float(), layer)
    return out


def convolve_backward(dy: Tensor, a: Tensor | None, through: Through) -> Gone:
    """``reference.convolve_backward``."""
    size, layer = through.size, through.layer.wide()
    da = empty_nhwc(dy, *size[1:]) if through.below else None
    dweight = None if a is None else torch.zeros_like(layer.weight, memory_format=torch.contiguous_format)
    for strip in _strips(dy, a, da):
        part = through._replace(layer=layer, size=dy[strip].shape[:1] + size[1:])
        gone = reference.convolve_backward(dy[strip].float(), None if a is None else a[strip].float(), part)
        if da is not None:
            assert isinstance(gone.into, Tensor)
            da[strip] = gone.into
        if dweight is not None:
            assert gone.weight is not None
            dweight += gone.weight
    return Gone(da, None if dweight is None else dweight.to(dy.dtype))


def _strips(*tensors: Tensor | None) -> Iterator[slice]:
    """Slices of tensors of the same length: as many rows or images as ``STRIP`` allows, one at least."""
    there = [x for x in tensors if x is not None]
    length, values = there[0].shape[0], sum(x.numel() for x in there)
    step = max(1, STRIP * length // max(1, values))
    return (slice(i, i + step) for i in range(0, length, step))
