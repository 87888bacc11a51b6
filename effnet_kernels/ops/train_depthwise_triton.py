"""The depthwise convolution in training, in Triton.

Forward is that of ``depthwise_conv_bn_act``, but it normalises and activates its input as it is loaded and takes the
statistics of each tile of its output from registers. Activations are evaluated again for every horizontal tap.

Backward starts from the gradient of the raw output as a map: formed on load, it would cost two loads and a derivative
per tap. The input's gradient is a gather, so nothing is added up in memory: a program owns input columns of one phase
``(column + left) % SW``, which see every SW-th horizontal tap and adjacent columns of the output. It multiplies by
the derivative of the input's activation on the way out and takes the sums of the next BatchNorm.

The weight's gradient is a sum over pixels. A program walks down a strip of rows once per horizontal tap, with as many
rows of the activated input in registers as the window has; the strip stays in the L1 and L2 caches from tap to tap.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.ops.common import empty_nhwc
from effnet_kernels.ops.depthwise_conv_bn_act_triton import activated, filtered
from effnet_kernels.ops.train_block import Layer, Source
from effnet_kernels.ops.train_maps_triton import norm_arguments, vector
from effnet_kernels.ops.train_parts_triton import add_up, merge, store_part
from effnet_kernels.ops.triton_common import (
    Config,
    activate_gradient,
    cdiv,
    channel_block,
    launch_kernel,
    narrow,
)

# Rows of the output that a program of the weight's gradient walks down.
STRIP = 8


def tile(dtype: torch.dtype, channels: int, kh: int, sh: int) -> Config:
    """(rows, columns, channels) of a tile and a thread for every 16 bytes, as in ``depthwise_conv_bn_act``."""
    block_c = channel_block(channels)
    columns = 8 if channels >= 640 else 16
    rows = 7 if sh == 1 and 3 < kh <= 5 else 4
    return Config((rows, columns, block_c), max(1, columns * block_c * dtype.itemsize // 512), 1)


SIZES = ("h", "w", "oh", "ow", "top", "left")


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def forward_kernel(
    y_ptr,  # [N, OH, OW, C]
    parts_ptr,  # [N * tiles, 4, C] float32
    x_ptr,  # [N, H, W, C]
    vectors_ptr,  # [4, C]
    weight_ptr,  # [C, KH, KW]
    h, w, oh, ow, top, left,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, STATISTICS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = (program // channel_blocks).to(tl.int64)
    tiles_w = tl.cdiv(ow, COLUMNS)
    tiles = tl.cdiv(oh, ROWS) * tiles_w
    row = (part % tiles // tiles_w).to(tl.int32) * ROWS
    column = (part % tiles_w).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)
    x_ptr += part // tiles * h * w * C
    y_ptr += part // tiles * oh * ow * C
    c_ok = (c < C)[None, :]
    scale = 1.0
    shift = 0.0
    if NORM:
        scale = vector(vectors_ptr, 0, c, C)
        shift = vector(vectors_ptr, 1, c, C)

    acc = filtered(
        x_ptr, weight_ptr, c, row, column, h, w, top, left, scale, shift,
        C, KH, KW, SH, SW, NORM, ACT, ROWS, COLUMNS, BLOCK_C,
    )  # fmt: skip

    dtype: tl.constexpr = y_ptr.dtype.element_ty
    kept = ()
    total = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    at = y_ptr + row.to(tl.int64) * ow * C + (column[:, None] * C + c[None, :])
    for o in tl.static_range(ROWS):
        y = narrow(acc[o], dtype)
        ok = (column < ow)[:, None] & c_ok & (row + o < oh)
        tl.store(at, y, mask=ok)
        at += ow.to(tl.int64) * C
        if STATISTICS:
            y = tl.where(ok, y.to(tl.float32), 0.0)
            total += y
            kept += (y,)
    if STATISTICS:
        columns = tl.minimum(ow - (part % tiles_w) * COLUMNS, COLUMNS)
        count = (tl.minimum(oh - row, ROWS) * columns).to(tl.float32)
        # Differences to the tile's own mean are exact, and so small that the square of their mean cancels nothing.
        middle = tl.sum(total, 0) / count
        sums = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
        squares = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
        for o in tl.static_range(ROWS):
            ok = (column < ow)[:, None] & c_ok & (row + o < oh)
            difference = tl.where(ok, kept[o] - middle[None, :], 0.0)
            sums += difference
            squares += difference * difference
        mean = tl.sum(sums, 0) / count
        store_part(parts_ptr, part, c, C, count, middle, mean, tl.sum(squares, 0) - mean * mean * count)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def input_gradient_kernel(
    dx_ptr,  # [N, H, W, C], of the normalised map if NORM
    sums_ptr,  # [N * tiles, 2, C] float32
    dy_ptr,  # [N, OH, OW, C]
    x_ptr,  # [N, H, W, C]
    vectors_ptr,  # [4, C]
    weight_ptr,  # [C, KH, KW]
    h, w, oh, ow, top, left,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile has SH * ROWS rows, of which the first has phase zero, and COLUMNS columns of one phase."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = (program // channel_blocks).to(tl.int64)
    phase = (part % SW).to(tl.int32)
    # Rows and columns of the output under which the first of the input lie.
    first_row = top // SH
    first_column = left // SW
    tiles_w = tl.cdiv((left + w - 1) // SW - first_column + 1, COLUMNS)
    tiles_h = tl.cdiv((top + h - 1) // SH - first_row + 1, ROWS)
    number = part // SW
    row = first_row + (number // tiles_w % tiles_h).to(tl.int32) * ROWS
    column = first_column + (number % tiles_w).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)
    n = number // tiles_w // tiles_h
    dy_ptr += n * oh * ow * C
    c_ok = (c < C)[None, :]

    above: tl.constexpr = (KH - 1) // SH  # rows of the output above the first that the tile sees
    acc = ()
    for _ in tl.static_range(ROWS * SH):
        acc += (tl.zeros((COLUMNS, BLOCK_C), tl.float32),)
    for m in range((KW + SW - 1) // SW):
        kw = m * SW + phase
        y_column = column - m
        ok = (y_column.to(tl.uint32) < ow)[:, None] & c_ok & (kw < KW)
        taps = ()
        for kh in tl.static_range(KH):
            tap = tl.load(weight_ptr + c * (KH * KW) + (kh * KW + kw), mask=(c < C) & (kw < KW), other=0.0)
            taps += (tap.to(tl.float32)[None, :],)
        at = dy_ptr + (row - above).to(tl.int64) * ow * C + (y_column[:, None] * C + c[None, :])
        for i in tl.static_range(ROWS + above):
            y_row = (row + (i - above)).to(tl.uint32)
            dy = tl.load(at, mask=ok & (y_row < oh), other=0.0).to(tl.float32)
            at += ow.to(tl.int64) * C
            updated = ()
            for o in tl.static_range(ROWS * SH):
                if 0 <= o - (i - above) * SH and o - (i - above) * SH < KH:
                    updated += (acc[o] + dy * taps[o - (i - above) * SH],)
                else:
                    updated += (acc[o],)
            acc = updated

    x_column = column * SW + phase - left
    x_ok = (x_column.to(tl.uint32) < w)[:, None] & c_ok
    if NORM:
        scale = vector(vectors_ptr, 0, c, C)
        shift = vector(vectors_ptr, 1, c, C)
        mean = vector(vectors_ptr, 2, c, C)
        rstd = vector(vectors_ptr, 3, c, C)
        sums = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
        products = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    at = (n * h + row * SH - top) * w * C + (x_column[:, None] * C + c[None, :])
    for o in tl.static_range(ROWS * SH):
        ok = x_ok & ((row * SH - top + o).to(tl.uint32) < h)
        dx = acc[o]
        if NORM:
            x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
            dx = tl.where(ok, activate_gradient(dx, x * scale + shift, ACT, dtype == tl.float32), 0.0)
            sums += dx
            products += dx * ((x - mean) * rstd)
        tl.store(dx_ptr + at, narrow(dx, dtype), mask=ok)
        at += w.to(tl.int64) * C
    if NORM:
        tl.store(sums_ptr + part * 2 * C + c, tl.sum(sums, 0), mask=c < C)
        tl.store(sums_ptr + (part * 2 + 1) * C + c, tl.sum(products, 0), mask=c < C)


@triton.jit(do_not_specialize=[*SIZES, "strip"], do_not_specialize_on_alignment=[*SIZES, "strip"])
def weight_gradient_kernel(
    sums_ptr,  # [N * tiles, C, KH, KW] float32
    dy_ptr,  # [N, OH, OW, C]
    x_ptr,  # [N, H, W, C]
    vectors_ptr,  # [4, C]
    h, w, oh, ow, top, left, strip,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = (program // channel_blocks).to(tl.int64)
    tiles_w = tl.cdiv(ow, COLUMNS)
    tiles = tl.cdiv(oh, strip) * tiles_w
    first = part % tiles // tiles_w * strip
    end = tl.minimum(first + strip, oh)
    column = (part % tiles_w).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)
    x_ptr += part // tiles * h * w * C
    dy_ptr += part // tiles * oh * ow * C
    y_ok = (column < ow)[:, None] & (c < C)[None, :]
    scale = 1.0
    shift = 0.0
    if NORM:
        scale = vector(vectors_ptr, 0, c, C)
        shift = vector(vectors_ptr, 1, c, C)

    overlap: tl.constexpr = max(KH - SH, 0)  # rows of the window that are also in the next one
    for kw in range(KW):
        x_column = column * SW - left + kw
        x_ok = y_ok & ((x_column >= 0) & (x_column < w))[:, None]
        acc = ()
        for _ in tl.static_range(KH):
            acc += (tl.zeros((COLUMNS, BLOCK_C), tl.float32),)
        window = ()
        for i in tl.static_range(overlap):
            x_row = first * SH - top + i
            at = x_row * w * C + (x_column[:, None] * C + c[None, :])
            window += (activated(x_ptr + at, x_ok & (x_row >= 0) & (x_row < h), scale, shift, NORM, ACT),)
        row = first
        while row < end:
            seen = window
            for i in tl.static_range(overlap, KH):
                x_row = row * SH - top + i
                at = x_row * w * C + (x_column[:, None] * C + c[None, :])
                seen += (activated(x_ptr + at, x_ok & (x_row >= 0) & (x_row < h), scale, shift, NORM, ACT),)
            at = row * ow * C + (column[:, None] * C + c[None, :])
            dy = tl.load(dy_ptr + at, mask=y_ok, other=0.0).to(tl.float32)
            updated = ()
            for kh in tl.static_range(KH):
                updated += (acc[kh] + seen[kh] * dy,)
            acc = updated
            window = ()
            for i in tl.static_range(overlap):
                window += (seen[KH - overlap + i],)
            row += 1
        for kh in tl.static_range(KH):
            at = sums_ptr + (part * C + c) * (KH * KW) + (kh * KW + kw)
            tl.store(at, tl.sum(acc[kh], 0), mask=c < C)


def forward(source: Source, layer: Layer, statistics: bool) -> tuple[Tensor, Tensor | None]:
    """The raw map and, on request, its [2, C] statistics."""
    x, weight = source.raw, layer.weight.contiguous()
    n, c, oh, ow = layer.output_size(x.shape)
    y = empty_nhwc(x, c, oh, ow)
    config = tile(x.dtype, c, weight.shape[2], layer.stride[0])
    rows, columns, block_c = config.block
    tiles = n * cdiv(oh, rows) * cdiv(ow, columns)
    parts = x.new_empty((tiles, 4, c), dtype=torch.float32) if statistics else None
    vectors, *norm = norm_arguments(source.norm)
    launch_kernel(
        forward_kernel,
        tiles * cdiv(c, block_c),
        (y, parts, x, vectors, weight),
        (*x.shape[2:], oh, ow, layer.padding[0], layer.padding[2]),
        (c, *weight.shape[2:], *layer.stride, *norm, statistics, *config.block),
        config,
    )
    return y, None if parts is None else merge(parts)


def input_gradient(
    dy: Tensor, source: Source | None, layer: Layer, size: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the source's map, [N, C, H, W]; if it is normalised that behind the norm, and [2, C] moments."""
    weight = layer.weight.contiguous()
    (n, c, h, w), (top, _, left, _), (sh, sw) = size, layer.padding, layer.stride
    dx = empty_nhwc(dy, c, h, w)
    config = tile(dy.dtype, c, weight.shape[2], sh)
    rows = min(config.block[0], 4 if dy.dtype == torch.float32 else 8)  # 8 rows of float32 spill
    config = config._replace(block=(cdiv(rows, sh), *config.block[1:]))
    rows, columns, block_c = config.block
    tiles = n * sw * cdiv((top + h - 1) // sh - top // sh + 1, rows)
    tiles *= cdiv((left + w - 1) // sw - left // sw + 1, columns)
    raw, norm = (None, None) if source is None else (source.raw, source.norm)
    sums = None if norm is None else dy.new_empty((1, tiles, 2, c), dtype=torch.float32)
    vectors, *options = norm_arguments(norm)
    launch_kernel(
        input_gradient_kernel,
        tiles * cdiv(c, block_c),
        (dx, sums, dy, raw, vectors, weight),
        (h, w, *dy.shape[2:], top, left),
        (c, *weight.shape[2:], sh, sw, *options, *config.block),
        config,
    )
    return dx, None if sums is None else add_up(sums)[0]


def weight_gradient(dy: Tensor, source: Source, layer: Layer) -> Tensor:
    """[C, 1, KH, KW] in the dtype of the weight."""
    n, c, oh, ow = dy.shape
    _, columns, block_c = (config := tile(dy.dtype, c, layer.weight.shape[2], layer.stride[0])).block
    tiles = n * cdiv(oh, STRIP) * cdiv(ow, columns)
    sums = dy.new_empty((1, tiles, *layer.weight.shape), dtype=torch.float32)
    vectors, *norm = norm_arguments(source.norm)
    launch_kernel(
        weight_gradient_kernel,
        tiles * cdiv(c, block_c),
        (sums, dy, source.raw, vectors),
        (*source.raw.shape[2:], oh, ow, layer.padding[0], layer.padding[2], STRIP),
        (c, *layer.weight.shape[2:], *layer.stride, *norm, columns, block_c),
        config,
    )
    return add_up(sums, dtype=layer.weight.dtype)[0]
