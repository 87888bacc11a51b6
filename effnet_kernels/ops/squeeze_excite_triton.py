"""``squeeze_excite`` in Triton: sums over tiles, the gate, the product.

Two reads of x and a write of y, 6 bytes per element in 16 bit. The second read comes from the L2 for as many images as
fit there; a map with its mean inside one thread block would save it, but takes more than a block's memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.ops import squeeze_excite_gate_triton as squeeze_excite_gate
from effnet_kernels.ops.common import to_nhwc
from effnet_kernels.ops.squeeze_excite import fake
from effnet_kernels.ops.triton_common import (
    Config,
    cdiv,
    channel_block,
    config,
    launch_kernel,
    narrow,
)


def default_config(dtype: torch.dtype, channels: int, arch: int) -> Config:
    """(PIXELS, BLOCK_C): four pieces of 16 bytes for each of 128 threads."""
    block_c = channel_block(channels)
    return Config((8192 // dtype.itemsize // block_c, block_c), 4, 1)


@triton.jit(do_not_specialize=["pixels"], do_not_specialize_on_alignment=["pixels"])
def kernel(
    out_ptr,  # SCALE: y [N, P, C], else sums [N, tiles, C] float32
    x_ptr,  # [N, P, C]
    gate_ptr,  # SCALE: [N, C] float32
    pixels,  # P
    C: tl.constexpr,
    SCALE: tl.constexpr,  # multiply by the gate, or add up
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = program // channel_blocks
    tiles = tl.cdiv(pixels, PIXELS)
    n = (tile // tiles).to(tl.int64)
    first = (tile % tiles).to(tl.int64) * PIXELS
    p = tl.arange(0, PIXELS)
    at = (n * pixels + first) * C + (p[:, None] * C + c[None, :])
    ok = (first + p < pixels)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if SCALE:
        gate = tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0)
        tl.store(out_ptr + at, narrow(x * gate[None, :], out_ptr.dtype.element_ty), mask=ok)
    else:
        tl.store(out_ptr + tile.to(tl.int64) * C + c, tl.sum(x, 0), mask=c < C)


def launch(out: Tensor, x: Tensor, se: Sequence[Tensor], act: str, gate: str) -> None:
    """Fill out: sums, gate and product are a launch each, the gate two where it has many weights."""
    x = to_nhwc(x)
    n, c, h, w = x.shape
    tile = config("squeeze_excite", default_config, (x.dtype, c), x.device)
    tiles = cdiv(h * w, tile.block[0])
    programs = n * tiles * cdiv(c, tile.block[1])
    sums = x.new_empty((n, tiles, c), dtype=torch.float32)
    scale = x.new_empty((n, c), dtype=torch.float32)
    launch_kernel(kernel, programs, (sums, x, None), (h * w,), (c, False, *tile.block), tile)
    squeeze_excite_gate.launch_sums(scale, sums, h * w, se, act, gate)
    launch_kernel(kernel, programs, (out, x, scale), (h * w,), (c, True, *tile.block), tile)


def run(*args: Any) -> Tensor:
    out = fake(*args)
    launch(out, *args)
    return out
