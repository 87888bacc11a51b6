"""``squeeze_excite_gate`` in Triton: two small kernels, one for the hidden units and one for the gate.

Designed for latency: an image has only 4 C R operations, and a program that does them all waits for one load after
another. Here a program takes a slice of the channels of a few images, so that one image has several programs, and asks
for all it needs before it waits for any of it. The first kernel loads weights and the sums of tiles that the depthwise
convolution leaves, and writes its slice's part of each hidden unit, 4 R bytes for an image and slice. The second one
loads weights and the parts, and adds these up.

Weights come from the L2 once for the images of a program: for each of the two, 2 C R bytes in 16 bit for four images,
110 KB in B0's widest block. The order of all additions depends on C, R and the tile, never on the other images.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.ops.activations import CODES
from effnet_kernels.ops.squeeze_excite_gate.op import fake
from effnet_kernels.ops.triton_common import (
    Config,
    activate,
    cdiv,
    channel_block,
    config,
    dense,
    launch_kernel,
    mean_of_sums,
    next_power_of_2,
    supports,
)

__all__ = ["default_config", "launch", "run", "supports"]


def default_config(channels: int, reduced: int, chip: int) -> Config:
    """(IMAGES, BLOCK_R, BLOCK_C) of both kernels: a thread has up to 64 weights, in 8 loads of 16 bytes if they are 2.

    IMAGES: one where channels are few, for there maps are large and have many tiles. BLOCK_R: all hidden units, unless
    there are very many. BLOCK_C: as many programs as a batch of 128 needs to reach all multiprocessors, and no more.
    """
    images = 1 if channels * reduced < 2048 else 4
    block_r = min(128, next_power_of_2(reduced))
    block_c = channel_block(channels) * (1 if channels < 768 else 2)
    return Config((images, block_r, block_c), max(4, block_r * block_c // 2048), 1)


SIZES = ["images", "tiles", "pixels"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def hidden_kernel(
    parts_ptr,  # [N, slices, R] float32
    sums_ptr,  # [N, tiles, C] float32
    weight_ptr,  # [R, C]
    images,
    tiles,
    pixels,
    C: tl.constexpr,
    R: tl.constexpr,
    TILES: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    slices: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    r_blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    part = program % slices
    c = tl.arange(0, BLOCK_C)
    c_ok = part * BLOCK_C + c < C
    r = program // slices % r_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    n = (program // (slices * r_blocks)).to(tl.int64) * IMAGES
    # Under way while the sums are added up. Masked channels are 0 here and in the means, masked rows are not stored.
    at = weight_ptr + part * BLOCK_C + (r[:, None] * C + c[None, :])
    w = tl.load(at, mask=(r < R)[:, None] & c_ok[None, :], other=0.0)

    column = tl.arange(0, IMAGES * BLOCK_C)  # the channels of all images side by side
    of = n + column // BLOCK_C
    channel = part * BLOCK_C + column % BLOCK_C
    at = sums_ptr + of * tiles * C + channel
    means = mean_of_sums(at, (of < images) & (channel < C), tiles, pixels, C, TILES)
    w = w.to(tl.float32)
    for i in tl.static_range(IMAGES):
        if n + i < images:
            mean = tl.gather(means, i * BLOCK_C + c, 0) if IMAGES > 1 else means
            hidden = tl.sum(w * mean[None, :], 1)
            tl.store(parts_ptr + ((n + i) * slices + part) * R + r, hidden, mask=r < R)


@triton.jit(do_not_specialize=["images"], do_not_specialize_on_alignment=["images"])
def gate_kernel(
    gate_ptr,  # [N, C] float32
    parts_ptr,  # [N, slices, R] float32
    b_reduce_ptr,  # [R]
    weight_ptr,  # [C, R]
    b_expand_ptr,  # [C]
    images,
    C: tl.constexpr,
    R: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    slices: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (program // slices).to(tl.int64) * IMAGES
    bias = tl.load(b_expand_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    gates = ()
    for _ in tl.static_range(IMAGES):
        gates += (tl.zeros((BLOCK_C,), tl.float32),)
    for first in range(0, R, BLOCK_R):
        r = tl.arange(0, BLOCK_R)
        at = weight_ptr + first + (c[:, None] * R + r[None, :])
        w = tl.load(at, mask=(c < C)[:, None] & (first + r < R)[None, :], other=0.0)

        column = tl.arange(0, IMAGES * BLOCK_R)  # the hidden units of all images side by side
        of = n + column // BLOCK_R
        unit = first + column % BLOCK_R
        # Masked units are finite, and their weights 0.
        total = tl.load(b_reduce_ptr + unit, mask=unit < R, other=0.0).to(tl.float32)
        for part in tl.static_range(slices):
            at = parts_ptr + (of * slices + part) * R + unit
            total += tl.load(at, mask=(of < images) & (unit < R), other=0.0)
        units = activate(total, ACT)
        updated = ()
        for i in tl.static_range(IMAGES):
            hidden = tl.gather(units, i * BLOCK_R + r, 0) if IMAGES > 1 else units
            updated += (gates[i] + tl.sum(w.to(tl.float32) * hidden[None, :], 1),)
        gates = updated
    for i in tl.static_range(IMAGES):
        # Sums over a row of weights are in all lanes that share it. Gathered, a channel is in one lane, which alone
        # evaluates the activation.
        total = tl.gather(gates[i], tl.arange(0, BLOCK_C), 0)
        tl.store(gate_ptr + (n + i) * C + c, activate(total + bias, GATE), mask=(c < C) & (n + i < images))


def launch_sums(
    gate: Tensor,  # [N, C], filled
    sums: Tensor,  # [N, tiles, C] float32
    pixels: int,  # that the sums of an image are made of
    se: Sequence[Tensor],
    act: str,
    gate_act: str,
) -> None:
    """Two launches."""
    n, tiles, c = sums.shape
    reduced = se[0].shape[0]
    w_reduce, b_reduce, w_expand, b_expand = dense(se)
    tile = config("squeeze_excite_gate", default_config, (c, reduced), gate.device)
    images, block_r, block_c = tile.block
    slices = cdiv(c, block_c)
    parts = sums.new_empty((n, slices, reduced), dtype=torch.float32)
    rows = max(1, 2048 * tile.num_warps // (images * block_c))  # of sums at once: 64 of a thread
    programs = cdiv(n, images) * slices
    launch_kernel(
        hidden_kernel,
        programs * cdiv(reduced, block_r),
        (parts, sums, w_reduce),
        (n, tiles, pixels),
        (c, reduced, rows, *tile.block),
        tile,
    )
    launch_kernel(
        gate_kernel,
        programs,
        (gate, parts, b_reduce, w_expand, b_expand),
        (n,),
        (c, reduced, CODES[act], CODES[gate_act], *tile.block),
        tile,
    )


def launch(out: Tensor, mean: Tensor, se: Sequence[Tensor], act: str, gate: str) -> None:
    """Fill the gate from means: sums over one tile of one pixel."""
    launch_sums(out, mean.contiguous()[:, None], 1, se, act, gate)


def run(*args: Any) -> Tensor:
    out = fake(*args)
    launch(out, *args)
    return out
