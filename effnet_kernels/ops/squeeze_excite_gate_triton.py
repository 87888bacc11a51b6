"""``squeeze_excite_gate`` in Triton: one launch, or two where there are many weights or hidden units.

Designed for latency: an image has only 4 C R operations, and a program that loads, waits and adds in turn spends its
time waiting.

Where a layer has up to 128 KB of weights and 64 hidden units, a program computes all hidden units of one image and then
the gate of its share of the channels. The launcher chooses how many programs share an image, by the number of images.
None waits for another: each computes the hidden units, with all weights of the first layer, 2 C R bytes in 16 bits from
the L2, and its share of as many of the second (1152-48: 110 KB each). Blocks of weights are under way before the sums
of tiles are added up, and as many at any time after that.

With more, that would take longer than a second launch. There a program takes a slice of the channels of a few
images and asks for all it needs before it waits for any of it. The first kernel loads weights and sums of tiles and
writes its slice's part of each hidden unit, 4 R bytes for an image and slice. The second one loads weights and the
parts, and adds these up. Weights come from the L2 once for the images of a program.

The order of all additions depends on C, R and the tile, never on the other images or on how many programs there are.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.ops.activations import CODES
from effnet_kernels.ops.squeeze_excite_gate import fake
from effnet_kernels.ops.triton_common import (
    Config,
    activate,
    callee,
    cdiv,
    channel_block,
    config,
    dense,
    launch_kernel,
    mean_of_sums,
    next_power_of_2,
)


def default_config(dtype: torch.dtype, channels: int, reduced: int, arch: int) -> Config:
    """(BLOCK_C, BLOCK_G) of one launch, (IMAGES, BLOCK_R, BLOCK_C) of two; ``dtype`` is that of the weights.

    One launch: all hidden units by BLOCK_C channels are up to 32 weights of a thread. ``num_stages`` of such blocks are
    under way, up to 64 KB: more than the L2 gives a multiprocessor while it waits for the first. BLOCK_G: small shares
    at batch 1, and not too many rounds of one program at batch 128. More than 64 hidden units or 4096 channels would
    not fit the registers.

    Two launches: a thread has up to 64 weights, in 8 loads of 16 bytes if they are 2. BLOCK_R: all hidden units, unless
    there are very many. BLOCK_C: as many programs as a batch of 128 needs to reach all multiprocessors, and no more.
    """
    if channels * reduced * dtype.itemsize <= 2**17 and channels <= 4096 and reduced <= 64:
        block_c = min(128, next_power_of_2(channels))
        stages = max(1, min(5, 2**16 // (next_power_of_2(reduced) * block_c * dtype.itemsize)))
        return Config((block_c, min(256, next_power_of_2(channels))), 8, stages)
    block_r = min(128, next_power_of_2(reduced))
    block_c = channel_block(channels) * (1 if channels < 768 else 2)
    return Config((4, block_r, block_c), max(4, block_r * block_c // 2048), 1)


SHARES = ["tiles", "pixels", "parts", "blocks"]
SLICE = tl.constexpr(32)  # of hidden units, by which the second layer's sums are two-dimensional


@callee
def reduce_weights(ptr, r, block: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The first layer's for hidden units r and a block of channels, 0 where there are none."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.load(ptr + (r[:, None] * C + c[None, :]), mask=(r < R)[:, None] & (c < C)[None, :], other=0.0)


@callee
def expand_weights(ptr, c, end, R: tl.constexpr, SLICE_R: tl.constexpr):
    """The second layer's for channels c and each slice of hidden units, 0 where there are none."""
    slices = ()
    for first in tl.static_range(0, R, SLICE_R):
        r = first + tl.arange(0, SLICE_R)
        mask = (c < end)[:, None] & (r < R)[None, :]
        slices += (tl.load(ptr + (c[:, None] * R + r[None, :]), mask=mask, other=0.0),)
    return slices


@triton.jit(do_not_specialize=SHARES, do_not_specialize_on_alignment=SHARES)
def whole_kernel(
    gate_ptr,  # [N, C] float32
    sums_ptr,  # [N, tiles, C] float32
    w_reduce_ptr,  # [R, C]
    b_reduce_ptr,  # [R]
    w_expand_ptr,  # [C, R]
    b_expand_ptr,  # [C]
    tiles,
    pixels,
    parts,  # programs of an image
    blocks,  # of channels for each of them, the last one may have fewer
    C: tl.constexpr,
    R: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,  # at least C
    BLOCK_R: tl.constexpr,  # at least R
    AHEAD: tl.constexpr,  # blocks of weights under way
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    SLICE_R: tl.constexpr = SLICE if BLOCK_R > SLICE else BLOCK_R
    SLICES: tl.constexpr = (R + SLICE_R - 1) // SLICE_R
    program = tl.program_id(0)
    image = program // parts
    part = program - image * parts
    n = image.to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    w = ()
    for block in tl.static_range(AHEAD):
        w += (reduce_weights(w_reduce_ptr, r, block, C, R, BLOCK_C),)

    column = tl.arange(0, WIDTH)
    means = mean_of_sums(sums_ptr + n * tiles * C + column, column < C, tiles, pixels, C, TILES)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for block in tl.static_range((C + BLOCK_C - 1) // BLOCK_C):
        if (block + AHEAD) * BLOCK_C < C:
            w += (reduce_weights(w_reduce_ptr, r, block + AHEAD, C, R, BLOCK_C),)
        mean = tl.gather(means, block * BLOCK_C + tl.arange(0, BLOCK_C), 0)
        sums += w[block].to(tl.float32) * mean[None, :]

    first = part * blocks * BLOCK_G
    end = tl.minimum(first + blocks * BLOCK_G, C)
    c = first + tl.arange(0, BLOCK_G)
    v = expand_weights(w_expand_ptr, c, end, R, SLICE_R)  # under way while the first layer comes to its end
    # Sums over a row of weights are in all lanes that share it. Gathered, a unit is in one lane, which alone evaluates
    # the activation.
    unit = tl.gather(tl.sum(sums, 1), r, 0) + tl.load(b_reduce_ptr + r, mask=r < R, other=0.0).to(tl.float32)
    unit = tl.where(r < R, activate(unit, ACT), 0.0)  # where there is none, an infinite mean has left a NaN
    hidden = ()
    for i in tl.static_range(SLICES):
        hidden += (tl.gather(unit, i * SLICE_R + tl.arange(0, SLICE_R), 0),)
    while first < end:
        following = expand_weights(w_expand_ptr, c + BLOCK_G, end, R, SLICE_R)
        bias = tl.load(b_expand_ptr + c, mask=c < end, other=0.0).to(tl.float32)
        products = tl.zeros((BLOCK_G, SLICE_R), tl.float32)
        for i in tl.static_range(SLICES):
            products += v[i].to(tl.float32) * hidden[i][None, :]
        total = tl.gather(tl.sum(products, 1), tl.arange(0, BLOCK_G), 0)  # a channel in one lane, as above
        tl.store(gate_ptr + n * C + c, activate(total + bias, GATE), mask=c < end)
        v = following
        c += BLOCK_G
        first += BLOCK_G


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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; where there is none, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def shares(images: int, blocks: int, available: int) -> tuple[int, int]:
    """How many programs share an image, and how many of its blocks of channels each has: one a multiprocessor."""
    each = cdiv(blocks, max(1, available // max(1, images)))
    return cdiv(blocks, each), each


def launch_sums(
    gate: Tensor,  # [N, C], filled
    sums: Tensor,  # [N, tiles, C] float32
    pixels: int,  # that the sums of an image are made of
    se: Sequence[Tensor],
    act: str,
    gate_act: str,
) -> None:
    """One launch or two, as the tile says."""
    n, tiles, c = sums.shape
    reduced = se[0].shape[0]
    w_reduce, b_reduce, w_expand, b_expand = dense(se)
    tile = config("squeeze_excite_gate", default_config, (w_reduce.dtype, c, reduced), gate.device)
    if len(tile.block) == 2:
        block_c, block_g = tile.block
        block_r, width = next_power_of_2(reduced), next_power_of_2(max(c, block_c))
        rows = max(1, (2048 if block_r <= 16 else 1024) * tile.num_warps // width)  # of sums at once: 64 or 32 a thread
        programs, blocks = shares(n, cdiv(c, block_g), multiprocessors(gate.device))
        ahead = min(tile.num_stages, cdiv(c, block_c))
        launch_kernel(
            whole_kernel,
            n * programs,
            (gate, sums, w_reduce, b_reduce, w_expand, b_expand),
            (tiles, pixels, programs, blocks),
            (c, reduced, CODES[act], CODES[gate_act], rows, width, block_r, ahead, *tile.block),
            tile,
        )
        return
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
