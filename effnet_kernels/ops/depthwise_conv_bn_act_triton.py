"""``depthwise_conv_bn_act`` in Triton.

Designed for one read of x and one write of y: 4 bytes per element in 16 bit at stride 1, 10 at stride 2. On an H100
that leaves about 35 instructions of a lane per element, fewer than a 5x5 window has products and conversions. So a
thread owns 16 bytes of channels and a column of ``ROWS`` outputs: an input is loaded and converted once per horizontal
tap, (ROWS + KH - 1) / ROWS * KW times per output instead of KH * KW, and the overlap of rows stays in registers. The
overlap of columns comes from the L1 cache.

Each program writes the sums of its outputs over its pixels; whoever wants the means adds these up in order, here a
second, tiny kernel, in ``mbconv`` the gate. Sizes of maps are never specialised on.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.ops.activations import CODES
from effnet_kernels.ops.common import to_nhwc
from effnet_kernels.ops.depthwise_conv_bn_act import fake
from effnet_kernels.ops.triton_common import (
    Config,
    activate,
    batch_norm_act,
    bn_affine,
    callee,
    cdiv,
    channel_block,
    config,
    dense,
    launch_kernel,
    mean_of_sums,
    narrow,
)


def default_config(dtype: torch.dtype, channels: int, kh: int, sh: int, arch: int) -> Config:
    """(ROWS, COLUMNS, BLOCK_C) of a tile, and as many threads as it has pieces of 16 bytes: in 16 bits one warp.

    Programs of one warp wait for nobody: on an H100 they are 10 to 50% faster than larger ones. ROWS is what the maps
    that published networks have at so many channels are multiples of, or nearly, with registers for the window's rows.
    Measured there in float16, on B0's maps; elsewhere the same, but for what would spill.
    """
    block_c = channel_block(channels)
    if kh > 5:
        rows = 4
    elif sh > 1:
        rows = 7 if kh == 5 else 8 if channels < 200 else 4
    elif kh == 5:
        rows = 5 if channels < 1000 else 7 if channels < 1200 else 6
        block_c = min(32, block_c) if channels < 1000 else block_c
    else:
        rows = 7 if channels < 1200 else 6
    columns = 256 // block_c
    return Config((rows, columns, block_c), max(1, columns * block_c * dtype.itemsize // 512), 1)


@callee
def activated(at, ok, scale, shift, NORM: tl.constexpr, ACT: tl.constexpr):
    """The input at these pointers as the convolution sees it: zero outside the map."""
    x = tl.load(at, mask=ok, other=0.0)
    exact: tl.constexpr = x.dtype == tl.float32
    x = x.to(tl.float32)
    if NORM:
        x = tl.where(ok, activate(x * scale + shift, ACT, exact), 0.0)
    return x


@callee
def filtered(
    x_ptr, weight_ptr, c, row, column, h, w, top, left, scale, shift,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The convolution's sums for the channels c of one image's tile, ROWS times float32 [COLUMNS, BLOCK_C].

    ``row`` is the first of the tile's rows. With ``NORM`` the input is normalised and activated as it is loaded.
    """
    acc = ()
    for _ in tl.static_range(ROWS):
        acc += (tl.zeros((COLUMNS, BLOCK_C), tl.float32),)
    # A loop at run time: unrolled, all loads of the window would be in flight at once and spill.
    for kw in range(KW):
        taps = ()
        for kh in tl.static_range(KH):
            tap = tl.load(weight_ptr + c * (KH * KW) + (kh * KW + kw), mask=c < C, other=0.0)
            taps += (tap.to(tl.float32)[None, :],)
        x_column = column * SW - left + kw
        # Unsigned, what lies before the map is far behind it.
        ok = (x_column.to(tl.uint32) < w)[:, None] & (c < C)[None, :]
        at = x_ptr + (row * SH - top).to(tl.int64) * w * C + (x_column[:, None] * C + c[None, :])
        for i in tl.static_range((ROWS - 1) * SH + KH):
            x_row = (row * SH - top + i).to(tl.uint32)
            x = activated(at, ok & (x_row < h), scale, shift, NORM, ACT)
            at += w.to(tl.int64) * C
            updated = ()
            for o in tl.static_range(ROWS):
                if 0 <= i - o * SH and i - o * SH < KH:
                    updated += (acc[o] + x * taps[i - o * SH],)
                else:
                    updated += (acc[o],)
            acc = updated
    return acc


SIZES = ["h", "w", "oh", "ow", "top", "left", "eps"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def kernel(
    y_ptr,  # [N, OH, OW, C]
    sums_ptr,  # [N, tiles, C] float32
    x_ptr,  # [N, H, W, C]
    weight_ptr,  # [C, KH, KW]
    gamma_ptr,  # [C], and so the next three
    beta_ptr,
    mean_ptr,
    var_ptr,
    h,
    w,
    oh,
    ow,
    top,
    left,
    eps,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    ACT: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # The channel blocks of a tile are neighbours in time: together they read whole pixels.
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = program // channel_blocks
    tiles_w = tl.cdiv(ow, COLUMNS)
    tiles = tl.cdiv(oh, ROWS) * tiles_w
    n = (tile // tiles).to(tl.int64)
    tile = tile % tiles
    row = tile // tiles_w * ROWS
    column = tile % tiles_w * COLUMNS + tl.arange(0, COLUMNS)
    x_ptr += n * h * w * C
    y_ptr += n * oh * ow * C
    c_ok = c < C

    acc = filtered(
        x_ptr, weight_ptr, c, row, column, h, w, top, left, 1.0, 0.0,
        C, KH, KW, SH, SW, False, ACT, ROWS, COLUMNS, BLOCK_C,
    )  # fmt: skip

    dtype: tl.constexpr = y_ptr.dtype.element_ty
    exact: tl.constexpr = y_ptr.dtype.element_ty == tl.float32
    scale, shift = bn_affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, c, c_ok, exact)
    total = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    at = y_ptr + row.to(tl.int64) * ow * C + (column[:, None] * C + c[None, :])
    for o in tl.static_range(ROWS):
        y = batch_norm_act(acc[o], scale[None, :], shift[None, :], ACT, exact)
        ok = (column < ow)[:, None] & c_ok[None, :] & (row + o < oh)
        tl.store(at, narrow(y, dtype), mask=ok)
        at += ow.to(tl.int64) * C
        if SUMS:
            total = tl.where(ok, total + y, total)
    if SUMS:
        tl.store(sums_ptr + (n * tiles + tile) * C + c, tl.sum(total, 0), mask=c_ok)


@triton.jit(do_not_specialize=["tiles", "pixels"], do_not_specialize_on_alignment=["tiles", "pixels"])
def mean_kernel(mean_ptr, sums_ptr, tiles, pixels, C: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr):
    """[N, C] from [N, tiles, C]: sums added up in order, divided by the number of pixels."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n = (tl.program_id(0) // channel_blocks).to(tl.int64)
    c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = mean_of_sums(sums_ptr + n * tiles * C + c, c < C, tiles, pixels, C, TILES)
    tl.store(mean_ptr + n * C + c, mean, mask=c < C)


def launch_sums(
    y: Tensor,  # [N, C, OH, OW], filled
    x: Tensor,
    weight: Tensor,
    bn: Sequence[Tensor],
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    with_sums: bool,
) -> Tensor | None:
    """Fill y; return the sums of each of its tiles, [N, tiles, C], or None."""
    x = to_nhwc(x)
    weight, *bn = dense((weight, *bn))
    n, c, h, w = x.shape
    oh, ow = y.shape[2:]
    kh, kw = weight.shape[2:]
    tile = config("depthwise_conv_bn_act", default_config, (x.dtype, c, kh, stride[0]), x.device)
    rows, columns, block_c = tile.block
    tiles = cdiv(oh, rows) * cdiv(ow, columns)
    sums = x.new_empty((n, tiles, c), dtype=torch.float32) if with_sums else None
    launch_kernel(
        kernel,
        n * tiles * cdiv(c, block_c),
        (y, sums, x, weight, *bn),
        (h, w, oh, ow, padding[0], padding[2], float(eps)),
        (c, kh, kw, stride[0], stride[1], CODES[act], with_sums, rows, columns, block_c),
        tile,
    )
    return sums


def launch(out: tuple[Tensor, Tensor], *args: Any) -> None:
    """Fill the map and, if ``with_mean``, its means."""
    y, mean = out
    sums = launch_sums(y, *args)
    if sums is not None:
        n, tiles, c = sums.shape
        pixels = y.shape[2] * y.shape[3]
        launch_kernel(mean_kernel, n * cdiv(c, 64), (mean, sums), (tiles, pixels), (c, 64, 32), Config((64, 32), 4))


def run(*args: Any) -> tuple[Tensor, Tensor]:
    out = fake(*args)
    launch(out, *args)
    return out
