"""Passes over whole maps in training, in Triton: statistics, pooling, normalisation, BatchNorm's sums and gradient.

Each reads its maps once. A program owns a strip of pixels of one image and a block of channels, and its lanes keep
partial results of their own until the strip ends; ``train_parts_triton`` puts those of all strips together. How a map
is cut depends on its shape alone.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.ops import triton_common as common
from effnet_kernels.ops.activations import CODES
from effnet_kernels.ops.train_block import Gradient, Norm, Source
from effnet_kernels.ops.train_parts_triton import add_up, merge, store_part
from effnet_kernels.ops.triton_common import (
    activate,
    activate_gradient,
    batch_norm_act,
    callee,
    cdiv,
    channel_block,
    narrow,
)

SIZES = ("pixels", "strip")
# Values of a tile: 16 bytes of 16-bit numbers for each of 128 threads.
TILE, WARPS = 1024, 4
# Programs of a launch, where the maps have as many tiles: twice what a large GPU holds at once.
PROGRAMS = 2048


@callee
def strip_of(pixels, strip, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: number of the strip, image, first pixel, end, channels."""
    # The channel blocks of a strip are neighbours in time: together they read whole pixels.
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = (program // channel_blocks).to(tl.int64)
    strips = tl.cdiv(pixels, strip)
    first = part % strips * strip
    return part, part // strips, first, tl.minimum(first + strip, pixels), c


@callee
def vector(vectors_ptr, index: tl.constexpr, c, C: tl.constexpr):
    """Row ``index`` of [K, C] at the channels c, as a row; zeros beyond the last."""
    return tl.load(vectors_ptr + index * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@callee
def behind_norm(grad_ptr, at, ok, y, scale, shift, gate, bias, GRAD: tl.constexpr, BIAS: tl.constexpr,
                ACT: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """``dz`` (see ``block``) where the raw map is y."""
    if GRAD:
        dz = tl.load(grad_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if BIAS:
            dz = dz * gate + bias
    else:
        dz = tl.zeros(y.shape, tl.float32) + bias
    return activate_gradient(dz, y * scale + shift, ACT, EXACT)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def statistics_kernel(
    parts_ptr,  # [N * strips, 4, C] float32
    raw_ptr,  # [N, P, C]
    pixels, strip,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part, n, first, end, c = strip_of(pixels, strip, C, BLOCK_C)
    raw_ptr += n * pixels * C
    # Where values lie close together and far from zero, differences to one of them are exact.
    shift = tl.load(raw_ptr + first * C + c, mask=c < C, other=0.0).to(tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_C), tl.float32)
    while first < end:  # Welford (Technometrics 4, 1962), one chain per lane
        rows = first + tl.arange(0, ROWS)
        ok = (rows < end)[:, None] & (c < C)[None, :]
        value = tl.load(raw_ptr + rows[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32) - shift[None, :]
        count += tl.where(rows < end, 1.0, 0.0)
        delta = tl.where(ok, value - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)[:, None]
        squares += delta * (value - mean)
        first += ROWS
    total = tl.sum(count, 0)
    middle = tl.sum(mean * count[:, None], 0) / total
    mean -= middle[None, :]
    squares += mean * mean * count[:, None]
    store_part(parts_ptr, part, c, C, total, shift, middle, tl.sum(squares, 0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def pool_kernel(
    sums_ptr,  # [N, strips, C] float32
    raw_ptr,  # [N, P, C]
    vectors_ptr,  # [4, C]
    pixels, strip,
    C: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part, n, first, end, c = strip_of(pixels, strip, C, BLOCK_C)
    raw_ptr += n * pixels * C
    if NORM:
        scale = vector(vectors_ptr, 0, c, C)
        shift = vector(vectors_ptr, 1, c, C)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    while first < end:
        rows = first + tl.arange(0, ROWS)
        ok = (rows < end)[:, None] & (c < C)[None, :]
        y = tl.load(raw_ptr + rows[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        if NORM:
            y = batch_norm_act(y, scale, shift, ACT, raw_ptr.dtype.element_ty == tl.float32)
        total += tl.where(ok, y, 0.0)
        first += ROWS
    tl.store(sums_ptr + part * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def apply_kernel(
    y_ptr,  # [N, P, C]
    raw_ptr,  # [N, P, C]
    vectors_ptr,  # [4, C]
    gate_ptr,  # [N, C]
    residual_ptr,  # [N, P, C]
    pixels, strip,
    C: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, n, first, end, c = strip_of(pixels, strip, C, BLOCK_C)
    base = n * pixels * C
    if NORM:
        scale = vector(vectors_ptr, 0, c, C)
        shift = vector(vectors_ptr, 1, c, C)
    if GATE:
        gate = vector(gate_ptr + n * C, 0, c, C)
    while first < end:
        rows = first + tl.arange(0, ROWS)
        ok = (rows < end)[:, None] & (c < C)[None, :]
        at = base + rows[:, None] * C + c[None, :]
        y = tl.load(raw_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if NORM:
            y = batch_norm_act(y, scale, shift, ACT, raw_ptr.dtype.element_ty == tl.float32)
        if GATE:
            y *= gate
        if RESIDUAL:
            y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=ok)
        first += ROWS


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def gradient_kernel(
    out_ptr,  # the gradient of the raw map, [N, P, C]; for the moments their sums, [N * strips, 2, C] float32
    grad_ptr,  # [N, P, C]
    raw_ptr,  # [N, P, C]
    vectors_ptr,  # [4, C]
    gate_ptr,  # [N, C]
    bias_ptr,  # [N, C]
    coefficients_ptr,  # [3, C]
    pixels, strip,
    C: tl.constexpr, ACT: tl.constexpr, GRAD: tl.constexpr, RAW: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    MOMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part, n, first, end, c = strip_of(pixels, strip, C, BLOCK_C)
    base = n * pixels * C
    scale = vector(vectors_ptr, 0, c, C)
    shift = vector(vectors_ptr, 1, c, C)
    mean = vector(vectors_ptr, 2, c, C)
    gate = 1.0
    bias = 0.0
    if GATE:
        gate = vector(gate_ptr + n * C, 0, c, C)
    if BIAS:
        bias = vector(bias_ptr + n * C, 0, c, C)
    if MOMENTS:
        rstd = vector(vectors_ptr, 3, c, C)
        sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
        products = tl.zeros((ROWS, BLOCK_C), tl.float32)
    else:
        p = vector(coefficients_ptr, 0, c, C)
        q = vector(coefficients_ptr, 1, c, C)
        r = vector(coefficients_ptr, 2, c, C)
    while first < end:
        rows = first + tl.arange(0, ROWS)
        ok = (rows < end)[:, None] & (c < C)[None, :]
        at = base + rows[:, None] * C + c[None, :]
        y = tl.zeros((ROWS, BLOCK_C), tl.float32)
        if RAW:
            y = tl.load(raw_ptr + at, mask=ok, other=0.0).to(tl.float32)
        exact: tl.constexpr = (grad_ptr if GRAD else raw_ptr).dtype.element_ty == tl.float32
        dz = behind_norm(grad_ptr, at, ok, y, scale, shift, gate, bias, GRAD, BIAS, ACT, exact)
        if MOMENTS:
            dz = tl.where(ok, dz, 0.0)
            sums += dz
            if RAW:
                products += dz * ((y - mean) * rstd)
        else:
            dy = p * dz
            if RAW:
                dy += q * (y - mean) + r
            tl.store(out_ptr + at, narrow(dy, out_ptr.dtype.element_ty), mask=ok)
        first += ROWS
    if MOMENTS:
        tl.store(out_ptr + part * 2 * C + c, tl.sum(sums, 0), mask=c < C)
        tl.store(out_ptr + (part * 2 + 1) * C + c, tl.sum(products, 0), mask=c < C)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def gate_moments_kernel(
    sums_ptr,  # [N, strips, 5, C] float32
    grad_ptr,  # [N, P, C]
    raw_ptr,  # [N, P, C]
    vectors_ptr,  # [4, C]
    pixels, strip,
    C: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part, n, first, end, c = strip_of(pixels, strip, C, BLOCK_C)
    base = n * pixels * C
    scale = vector(vectors_ptr, 0, c, C)
    shift = vector(vectors_ptr, 1, c, C)
    mean = vector(vectors_ptr, 2, c, C)
    rstd = vector(vectors_ptr, 3, c, C)
    exact: tl.constexpr = raw_ptr.dtype.element_ty == tl.float32
    zero = tl.zeros((ROWS, BLOCK_C), tl.float32)
    sums = (zero, zero, zero, zero, zero)
    while first < end:
        rows = first + tl.arange(0, ROWS)
        ok = (rows < end)[:, None] & (c < C)[None, :]
        at = base + rows[:, None] * C + c[None, :]
        y = tl.load(raw_ptr + at, mask=ok, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=ok, other=0.0).to(tl.float32)
        z = y * scale + shift
        slope = activate_gradient(tl.where(ok, 1.0, 0.0), z, ACT, exact)
        xhat = (y - mean) * rstd
        through = grad * slope
        value = grad * activate(z, ACT, exact)
        sums = (
            sums[0] + value, sums[1] + through, sums[2] + slope, sums[3] + through * xhat, sums[4] + slope * xhat,
        )  # fmt: skip
        first += ROWS
    for k in tl.static_range(5):
        tl.store(sums_ptr + (part * 5 + k) * C + c, tl.sum(sums[k], 0), mask=c < C)


# ---- host code ----


class Strips:
    """How a map is cut."""

    def __init__(self, x: Tensor) -> None:
        self.images, self.channels, height, width = x.shape
        self.pixels = height * width
        block_c = channel_block(self.channels)
        rows = TILE // block_c
        self.config = common.Config((rows, block_c), WARPS, 1)
        self.blocks = cdiv(self.channels, block_c)
        wanted = cdiv(PROGRAMS, max(1, self.images * self.blocks))
        self.strip = max(1, cdiv(cdiv(self.pixels, wanted), rows)) * rows
        self.strips = cdiv(self.pixels, self.strip)

    def launch(self, kernel: object, tensors: Sequence[Tensor | None], *options: int | bool) -> None:
        common.launch_kernel(
            kernel,
            self.images * self.strips * self.blocks,
            tensors,
            (self.pixels, self.strip),
            (self.channels, *options, *self.config.block),
            self.config,
        )


def statistics(raw: Tensor) -> Tensor:
    s = Strips(raw)
    parts = raw.new_empty((s.images * s.strips, 4, s.channels), dtype=torch.float32)
    s.launch(statistics_kernel, (parts, raw))
    return merge(parts)


def pool(source: Source) -> Tensor:
    s = Strips(source.raw)
    sums = source.raw.new_empty((s.images, s.strips, s.channels), dtype=torch.float32)
    vectors, *options = norm_arguments(source.norm)
    s.launch(pool_kernel, (sums, source.raw, vectors), *options)
    return add_up(sums, 1.0 / s.pixels)


def apply(source: Source, residual: Tensor | None) -> Tensor:
    raw, gate = source.raw, dense(source.gate)
    y = torch.empty_like(raw)
    vectors, *options = norm_arguments(source.norm)
    options += [gate is not None, residual is not None]
    Strips(raw).launch(apply_kernel, (y, raw, vectors, gate, residual), *options)
    return y


def moments(gradient: Gradient) -> Tensor:
    s = Strips(map_of(gradient))
    sums = gradient.norm.vectors.new_empty((1, s.images * s.strips, 2, s.channels), dtype=torch.float32)
    _gradient(s, sums, gradient, None)
    return add_up(sums)[0]


def gate_moments(grad: Tensor, source: Source) -> Tensor:
    assert source.norm is not None
    s = Strips(grad)
    sums = grad.new_empty((s.images, s.strips, 5, s.channels), dtype=torch.float32)
    s.launch(gate_moments_kernel, (sums, grad, source.raw, source.norm.vectors), CODES[source.norm.act])
    return add_up(sums).transpose(0, 1)


def raw_gradient(gradient: Gradient, coefficients: Tensor) -> Tensor:
    out = gradient.grad if gradient.owned else None
    if out is None:
        out = torch.empty_like(map_of(gradient))
    _gradient(Strips(out), out, gradient, coefficients)
    return out


def _gradient(strips: Strips, out: Tensor, g: Gradient, coefficients: Tensor | None) -> None:
    gate, bias = dense(g.gate), dense(g.bias)
    assert g.grad is None or (gate is None) == (bias is None)
    tensors = (out, g.grad, g.raw, g.norm.vectors, gate, bias, coefficients)
    there = [t is not None for t in (g.grad, g.raw, gate, bias)]
    strips.launch(gradient_kernel, tensors, CODES[g.act], *there, coefficients is None)


def map_of(gradient: Gradient) -> Tensor:
    """A map of the gradient's shape and dtype."""
    x = gradient.grad if gradient.grad is not None else gradient.raw
    assert x is not None
    return x


def norm_arguments(norm: Norm | None) -> tuple[Tensor | None, bool, int]:
    """The vectors, whether there are any, and the activation's code."""
    return (None, False, CODES["identity"]) if norm is None else (norm.vectors, True, CODES[norm.act])


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
