"""Sums and statistics of a map from those of its tiles, in Triton: in one order, so two runs give the same bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.ops.triton_common import Config, callee, cdiv, launch_kernel, narrow


@callee
def store_part(parts_ptr, part, c, C: tl.constexpr, count, shift, mean, squares):
    """The statistics of some values: how many, their mean less ``shift``, the sum of their squared deviations."""
    at = parts_ptr + part * 4 * C + c
    tl.store(at, tl.zeros(c.shape, tl.float32) + count, mask=c < C)
    tl.store(at + C, shift, mask=c < C)
    tl.store(at + 2 * C, mean, mask=c < C)
    tl.store(at + 3 * C, squares, mask=c < C)


@triton.jit(do_not_specialize=["rows", "each"], do_not_specialize_on_alignment=["rows", "each"])
def merge_kernel(
    out_ptr,  # [2, C] mean and variance if all parts are put together, else parts [chunks, 4, C]
    parts_ptr,  # [rows, 4, C]
    rows, each,
    C: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The statistics of ``each`` parts together (Chan, Golub and LeVeque, The American Statistician 37, 1983)."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    chunk = tl.program_id(0) // channel_blocks
    c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = chunk * each
    end = tl.minimum(first + each, rows)
    shift = tl.load(parts_ptr + (first * 4 + 1) * C + c, mask=(c < C) & (first < end), other=0.0)
    count = tl.zeros((PARTS, BLOCK_C), tl.float32)
    sums = tl.zeros((PARTS, BLOCK_C), tl.float32)
    row = first
    while row < end:
        part = row + tl.arange(0, PARTS)[:, None]
        ok = (part < end) & (c < C)[None, :]
        at = parts_ptr + part * 4 * C + c[None, :]
        values = tl.load(at, mask=ok, other=0.0)
        mean = tl.load(at + C, mask=ok, other=0.0) - shift[None, :] + tl.load(at + 2 * C, mask=ok, other=0.0)
        count += values
        sums += tl.where(ok, values * mean, 0.0)
        row += PARTS
    total = tl.maximum(tl.sum(count, 0), 1.0)  # beyond the last channel nothing was counted
    middle = tl.sum(sums, 0) / total
    squares = tl.zeros((PARTS, BLOCK_C), tl.float32)
    row = first
    while row < end:
        part = row + tl.arange(0, PARTS)[:, None]
        ok = (part < end) & (c < C)[None, :]
        at = parts_ptr + part * 4 * C + c[None, :]
        mean = tl.load(at + C, mask=ok, other=0.0) - shift[None, :] + tl.load(at + 2 * C, mask=ok, other=0.0)
        mean -= middle[None, :]
        spread = tl.load(at + 3 * C, mask=ok, other=0.0) + tl.load(at, mask=ok, other=0.0) * mean * mean
        squares += tl.where(ok, spread, 0.0)
        row += PARTS
    if each >= rows:  # at run time: a larger map must not need another kernel
        tl.store(out_ptr + c, shift + middle, mask=c < C)
        tl.store(out_ptr + C + c, tl.sum(squares, 0) / total, mask=c < C)
    else:
        store_part(out_ptr, chunk, c, C, total, shift, middle, tl.sum(squares, 0))


ADD_SIZES = ("rows", "each", "chunks", "width", "factor")


@triton.jit(do_not_specialize=ADD_SIZES, do_not_specialize_on_alignment=ADD_SIZES)
def add_kernel(
    out_ptr,  # [groups, chunks, width]
    sums_ptr,  # [groups, rows, width] float32
    rows, each, chunks, width, factor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    sums_ptr += chunk // chunks * rows * width
    row = chunk % chunks * each
    end = tl.minimum(row + each, rows)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    while row < end:
        r = row + tl.arange(0, ROWS)
        ok = (r < end)[:, None] & (i < width)[None, :]
        total += tl.load(sums_ptr + r[:, None] * width + i[None, :], mask=ok, other=0.0)
        row += ROWS
    tl.store(out_ptr + chunk * width + i, narrow(tl.sum(total, 0) * factor, out_ptr.dtype.element_ty), mask=i < width)


# ---- host code ----


def add_up(sums: Tensor, factor: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[groups, ...] from [groups, rows, ...] times ``factor``: in order, 128 rows at a time where there are many."""
    groups, rows = sums.shape[:2]
    each = max(1, rows if rows <= 256 else 128)
    chunks = max(1, cdiv(rows, each))
    last = chunks == 1
    out = sums.new_empty((groups, chunks, *sums.shape[2:]), dtype=dtype if last else torch.float32)
    width = out[0, 0].numel() if groups else 0
    launch_kernel(
        add_kernel,
        groups * chunks * cdiv(width, 32),
        (out, sums),
        (rows, each, chunks, width, factor if last else 1.0),
        (32, 32),
        Config((32, 32), 4, 1),
    )
    return out[:, 0] if last else add_up(out, factor, dtype)


def merge(parts: Tensor) -> Tensor:
    """[2, C] mean and biased variance from the statistics of parts, [rows, 4, C]: in order, 128 at a time."""
    rows, _, c = parts.shape
    each = max(1, rows if rows <= 256 else 128)
    chunks = max(1, cdiv(rows, each))
    last = chunks == 1
    out = parts.new_empty((2, c) if last else (chunks, 4, c))
    config = Config((32, 32), 4, 1)
    launch_kernel(merge_kernel, chunks * cdiv(c, 32), (out, parts), (rows, each), (c, *config.block), config)
    return out if last else merge(out)
