"""``fused_mbconv`` in Triton: two GEMMs back to back, so that the expanded tensor never leaves the chip.

Designed for one read of x and one write of y: ``e (P_in C_in + P_out C_out)`` bytes for element size e. A program owns
a run of output pixels. It walks over chunks of expanded channels as attention walks over keys: an implicit GEMM over
the window gives the chunk, BatchNorm and activation act on it in registers, a second GEMM adds it to the projection.
Every chunk reads the window of x once per tap, from the L2; hence as few and as wide chunks as registers allow. Staged
copies of 16 bytes pass the L1 by, those of 8 do not: where one chunk of 256 has all expanded channels and its program a
multiprocessor alone, x is copied by 8 bytes, and of the nine taps most should come from the L1. That is a prediction:
516 us become 382 us for 48-192-48 on maps of 96 x 96 on an H100, batch 128, bound by weights from the L2.

Without a projection the first GEMM is the op, and its channels are spread over programs. With few input channels
(a stem) the window is one short GEMM axis, read from x of any strides: an NCHW image needs no extra pass. Its loads
are of single elements and bound by instructions: a lane has all of a pixel's window, so that where an element lies in
it is a constant, and whether a tap lies inside the image is two comparisons for all its channels.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.ops import triton_common as common
from effnet_kernels.ops.activations import CODES
from effnet_kernels.ops.fused_mbconv import fake
from effnet_kernels.ops.triton_common import batch_norm_act, bn_affine, callee, cdiv, dot, narrow, next_power_of_2

# Where the order of a tile in memory is not known, Triton 3.6 spreads lanes along its first axis, 3.8 along its last.
# Pixels of a stem are on that axis: each lane then has whole windows, whose offsets are constants.
WINDOW_AXIS = tl.constexpr(1 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 0)
FLAT_BELOW = 16  # input channels; from here on a tap fills the depth of a matrix instruction


def default_config(dtype: torch.dtype, c_in: int, c_mid: int, c_out: int, taps: int, arch: int) -> common.Config:
    """(pixels, expanded channels, output channels, depth of the window's GEMM) of a tile; ``c_out`` is 0 for none.

    All expanded channels in one chunk where the accumulators allow it: up to 256, in the registers of 16 warps on
    Hopper and in tensor memory on Blackwell; chunks of 128 above. Few input channels take one stage: staged copies
    would pass the L1 by, where the other taps find the window. Warps and depth are those at which nothing spills.
    Measured on an H100 in float16.
    """
    block_out = min(64, max(16, next_power_of_2(c_out)))
    rows = max(16, next_power_of_2(c_mid))
    if dtype == torch.float32:
        return common.Config((32, min(32, rows), block_out, 16), 4, 2)
    depth = 64
    if c_in < FLAT_BELOW:
        depth = min(64, max(16, next_power_of_2(taps * c_in)))
    elif cdiv(c_in, 32) * 32 < cdiv(c_in, 64) * 64:
        depth = 32
    if c_out > 64:
        block_out = 128
    if c_in < FLAT_BELOW and not c_out and rows >= 32:
        return common.Config((64, 32, block_out, depth), 1, 3)
    if rows <= 32 and FLAT_BELOW <= c_in <= 32 and not c_out:
        return common.Config((64, rows, block_out, depth), 2, 1)
    if rows <= 64:
        return common.Config((128, rows, block_out, depth), 4, 3)
    if arch < 90:
        return common.Config((64, 128, block_out, depth), 4 if block_out > 32 else 8, 3)
    if rows == 128 or not c_out:
        return common.Config((128, 128, block_out, depth), 8, 1 if depth == 32 else 3)
    if arch == 90 and c_out > 64:
        return common.Config((128, 128, block_out, min(32, depth)), 16, 3)
    if c_mid > 256 or (arch != 90 and depth == 32):
        return common.Config((128, 128, block_out, depth), 8, 3)
    if arch == 90 and c_in % 64 > 32:  # short steps, of which none multiplies zeros
        return common.Config((128, 256, block_out, 16), 16, 5)
    return common.Config((128, 256, block_out, depth), 16 if arch == 90 else 8, 3)


SIZES = (
    "pixels", "height", "width", "out_height", "out_width", "stride_n", "stride_c", "stride_h", "stride_w",
    "top", "left", "eps", "project_eps",
)  # fmt: skip


@callee
def window_gemm(
    x_ptr,  # [BLOCK_M] pointers to the top left element of each pixel's window
    weight_ptr, ok, h, w, mid, height, width, stride_c, stride_h, stride_w,
    C_IN: tl.constexpr, C_MID: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, NEAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_MID: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The convolution's sums for one tile of pixels and the channels ``mid``, float32."""
    acc = tl.zeros([BLOCK_MID, BLOCK_M], tl.float32)
    weight_ptr += mid * (KH * KW * C_IN)
    mid_ok = (mid < C_MID)[:, None]
    if FLAT:
        h = tl.expand_dims(tl.where(ok, h, -KH), WINDOW_AXIS)  # the windows of those that are none lie outside
        w = tl.expand_dims(w, WINDOW_AXIS)
        x_ptr = tl.expand_dims(x_ptr, WINDOW_AXIS)
        if WIDE:
            stride_c = stride_c.to(tl.int64)
            stride_h = stride_h.to(tl.int64)
            stride_w = stride_w.to(tl.int64)
        for k0 in range(0, KH * KW * C_IN, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            k_ok = k < KH * KW * C_IN
            weight = tl.load(weight_ptr[:, None] + k[None, :], mask=mid_ok & k_ok[None, :], other=0.0)
            k = tl.expand_dims(k, 1 - WINDOW_AXIS)
            tap = k // C_IN
            kh = tap // KW
            kw = tap % KW
            inside = (h + kh).to(tl.uint32) < height.to(tl.uint32)  # negative: large
            inside &= (w + kw).to(tl.uint32) < width.to(tl.uint32)
            at = kh * stride_h + kw * stride_w + (k % C_IN) * stride_c
            x = tl.load(x_ptr + at, mask=inside & tl.expand_dims(k_ok, 1 - WINDOW_AXIS), other=0.0)
            acc = dot(weight, tl.trans(x) if WINDOW_AXIS == 1 else x, acc)
    else:
        blocks: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
        for step in range(KH * KW * blocks):
            tap = step // blocks
            kh = tap // KW
            kw = tap - kh * KW
            c = (step - tap * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = ok & ((h + kh).to(tl.uint32) < height.to(tl.uint32))  # negative: large
            inside &= (w + kw).to(tl.uint32) < width.to(tl.uint32)
            at = (kh * width + kw) * C_IN + c
            if NEAR and C_IN % 4 == 0:
                at = tl.multiple_of(at, 4)  # true, and less than Triton knows
            x = tl.load(x_ptr[:, None] + at[None, :], mask=inside[:, None] & (c < C_IN)[None, :], other=0.0)
            at = tap * C_IN + c
            weight = tl.load(weight_ptr[:, None] + at[None, :], mask=mid_ok & (c < C_IN)[None, :], other=0.0)
            acc = dot(weight, tl.trans(x), acc)
    return acc


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def kernel(
    y_ptr,  # [P, C_OUT], without projection [P, C_MID]
    x_ptr,  # [N, H, W, C_IN] dense, any strides if FLAT
    weight_ptr,  # [C_MID, KH, KW, C_IN]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr,  # [C_MID]
    project_ptr,  # [C_OUT, C_MID]
    project_gamma_ptr, project_beta_ptr, project_mean_ptr, project_var_ptr,  # [C_OUT]
    pixels,  # P = N OH OW
    height, width, out_height, out_width, stride_n, stride_c, stride_h, stride_w, top, left, eps, project_eps,
    C_IN: tl.constexpr, C_MID: tl.constexpr, C_OUT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, ACT: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, PROJECT: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_MID: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    exact: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    NEAR: tl.constexpr = BLOCK_MID == 256 and not exact  # one program fills the registers, much of the L1 is free
    BLOCK_N: tl.constexpr = BLOCK_OUT if PROJECT else BLOCK_MID
    channels: tl.constexpr = C_OUT if PROJECT else C_MID
    tiles_n: tl.constexpr = (channels + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    n = (program % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)

    # Pixel, its image and its place there. A tile may span images; only the first one's number is large.
    first = (program // tiles_n).to(tl.int64) * BLOCK_M
    out_pixels = out_height * out_width
    image = first // out_pixels
    within = (first - image * out_pixels).to(tl.int32) + tl.arange(0, BLOCK_M)
    ok = first + tl.arange(0, BLOCK_M) < pixels
    row = within // out_width
    h = (row % out_height) * SH - top
    w = (within - row * out_width) * SW - left
    image += within // out_pixels
    if FLAT:
        windows = x_ptr + image * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    else:
        windows = x_ptr + ((image * height + h) * width + w) * C_IN

    if PROJECT:
        acc = tl.zeros([BLOCK_OUT, BLOCK_M], tl.float32)
        for mid0 in range(0, C_MID, BLOCK_MID):
            mid = mid0 + tl.arange(0, BLOCK_MID)
            part = window_gemm(
                windows, weight_ptr, ok, h, w, mid, height, width, stride_c, stride_h, stride_w,
                C_IN, C_MID, KH, KW, FLAT, WIDE, NEAR, BLOCK_M, BLOCK_MID, BLOCK_K,
            )  # fmt: skip
            scale, shift = bn_affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, mid, mid < C_MID, exact)
            part = batch_norm_act(part, scale[:, None], shift[:, None], ACT, exact)
            if C_MID % BLOCK_MID != 0:
                part = tl.where((mid < C_MID)[:, None], part, 0.0)  # 0 * inf is not 0
            mask = (n < C_OUT)[:, None] & (mid < C_MID)[None, :]
            project = tl.load(project_ptr + n[:, None] * C_MID + mid[None, :], mask=mask, other=0.0)
            acc = dot(project, narrow(part, dtype), acc)
        scale, shift = bn_affine(
            project_gamma_ptr, project_beta_ptr, project_mean_ptr, project_var_ptr, project_eps, n, n < C_OUT, exact
        )
        y = acc * scale[:, None] + shift[:, None]
    else:
        y = window_gemm(
            windows, weight_ptr, ok, h, w, n, height, width, stride_c, stride_h, stride_w,
            C_IN, C_MID, KH, KW, FLAT, WIDE, NEAR, BLOCK_M, BLOCK_MID, BLOCK_K,
        )  # fmt: skip
        scale, shift = bn_affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, n, n < C_MID, exact)
        y = batch_norm_act(y, scale[:, None], shift[:, None], ACT, exact)
    at = (first + tl.arange(0, BLOCK_M))[None, :] * channels + n[:, None]
    mask = (n < channels)[:, None] & ok[None, :]
    if RESIDUAL:
        y += tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, narrow(y, dtype), mask=mask)


def launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bn: Sequence[Tensor],
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    project_weight: Tensor | None,
    project_bn: Sequence[Tensor],
    project_eps: float,
    residual: bool,
) -> None:
    c_mid, c_in, kh, kw = weight.shape
    images, c_out, out_height, out_width = out.shape
    flat = c_in < FLAT_BELOW
    if not flat or residual:
        x = common.to_nhwc(x)
    project = project_weight is not None
    problem_class = (x.dtype, c_in, c_mid, c_out if project else 0, kh * kw)
    config = common.config("fused_mbconv", default_config, problem_class, x.device)
    block_m, block_mid, block_out, _ = config.block
    tensors = (
        out,
        x,
        common.to_nhwc(weight),  # as it is where the model is channels-last
        *common.dense(bn),
        None if project_weight is None else project_weight.reshape(c_out, c_mid).contiguous(),
        *(common.dense(project_bn) if project else (None,) * 4),
    )
    stride_n, stride_c, stride_h, stride_w = x.stride()
    wide = flat and (c_in - 1) * stride_c + (kh - 1) * stride_h + (kw - 1) * stride_w >= 2**31  # within a window
    sizes = (
        images * out_height * out_width, x.shape[2], x.shape[3], out_height, out_width,
        stride_n, stride_c, stride_h, stride_w, padding[0], padding[2], float(eps), float(project_eps),
    )  # fmt: skip
    constants = (
        c_in, c_mid, c_out if project else 0, kh, kw, stride[0], stride[1], CODES[act],
        flat, wide, project, residual, *config.block,
    )  # fmt: skip
    tiles_n = cdiv(c_out, block_out) if project else cdiv(c_mid, block_mid)
    programs = cdiv(images * out_height * out_width, block_m) * tiles_n
    common.launch_kernel(kernel, programs, tensors, sizes, constants, config)


def run(*args) -> Tensor:
    out = fake(*args)
    launch(out, *args)
    return out
