"""``squeeze_excite_gate`` in Triton: both layers in one small kernel, a program per image.

A program reads both weights, 2 C R elements, from the L2: 110 KB in B0's widest block, 2.5 MB in B7's. It also turns
the sums of tiles that the depthwise convolution leaves into means, so that SE costs a block one launch.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.ops.activations import CODES
from effnet_kernels.ops.squeeze_excite_gate.op import fake
from effnet_kernels.ops.triton_common import (
    Config,
    activate,
    config,
    dense,
    launch_kernel,
    mean_of_sums,
    next_power_of_2,
    supports,
)

__all__ = ["default_config", "launch", "run", "supports"]


def default_config(channels: int, reduced: int, chip: int) -> Config:
    """(BLOCK_R, BLOCK_C): all hidden units, and as many channels as make a tile of 8192 weights, 32 a thread."""
    block_r = next_power_of_2(reduced)
    block_c = min(next_power_of_2(channels), max(16, 8192 // block_r))
    return Config((block_r, block_c), max(1, min(8, block_r * block_c // 256)), 1)


SIZES = ["tiles", "pixels"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def kernel(
    gate_ptr,  # [N, C] float32
    sums_ptr,  # [N, tiles, C] float32
    w_reduce_ptr,  # [R, C]
    b_reduce_ptr,  # [R]
    w_expand_ptr,  # [C, R]
    b_expand_ptr,  # [C]
    tiles,
    pixels,
    C: tl.constexpr,
    R: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    sums_ptr += n * tiles * C
    gate_ptr += n * C
    r = tl.arange(0, BLOCK_R)
    r_ok = r < R

    hidden = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mean = mean_of_sums(sums_ptr, tiles, pixels, c, C, TILES)
        ok = r_ok[:, None] & (c < C)[None, :]
        w = tl.load(w_reduce_ptr + r[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        # What the mask leaves out has to stay out: a mean may be infinite.
        hidden += tl.sum(tl.where(ok, w * mean[None, :], 0.0), 1)
    hidden = activate(hidden + tl.load(b_reduce_ptr + r, mask=r_ok, other=0.0).to(tl.float32), ACT)

    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        ok = (c < C)[:, None] & r_ok[None, :]
        w = tl.load(w_expand_ptr + c[:, None] * R + r[None, :], mask=ok, other=0.0).to(tl.float32)
        gate = tl.sum(tl.where(ok, w * hidden[None, :], 0.0), 1)
        gate = activate(gate + tl.load(b_expand_ptr + c, mask=c < C, other=0.0).to(tl.float32), GATE)
        tl.store(gate_ptr + c, gate, mask=c < C)


def launch_sums(
    gate: Tensor,  # [N, C], filled
    sums: Tensor,  # [N, tiles, C] float32
    pixels: int,  # that the sums of an image are made of
    se: Sequence[Tensor],
    act: str,
    gate_act: str,
) -> None:
    n, tiles, c = sums.shape
    reduced = se[0].shape[0]
    tile = config("squeeze_excite_gate", default_config, (c, reduced), gate.device)
    block_r, block_c = tile.block
    launch_kernel(
        kernel,
        n,
        (gate, sums, *dense(se)),
        (tiles, pixels),
        (c, reduced, CODES[act], CODES[gate_act], block_r, block_c, max(1, 2048 // block_c)),
        tile,
    )


def launch(out: Tensor, mean: Tensor, se: Sequence[Tensor], act: str, gate: str) -> None:
    """Fill the gate from means: sums over one tile of one pixel."""
    launch_sums(out, mean.contiguous()[:, None], 1, se, act, gate)


def run(*args: Any) -> Tensor:
    out = fake(*args)
    launch(out, *args)
    return out
