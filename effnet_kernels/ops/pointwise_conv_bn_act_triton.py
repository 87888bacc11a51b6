"""``pointwise_conv_bn_act`` in Triton: a GEMM with everything else in its prologue and epilogue.

Designed for one read of x and of the residual and one write of y: ``e P (C_in + C_out [+ C_out])`` bytes for P pixels
of element size e. Programs that share pixels are neighbours in the grid, so that only the first of them looks for x
outside the L2; the weight stays there. With the pool, y is never written: one program owns all pixels of an image for
its channels and adds them up in order.

The product is W @ x^T. With channels along the rows of the accumulator, a thread holds one to four channels of many
pixels and needs as many scales and shifts; with pixels along the rows it would need those of 16 to 64 channels, which
cost more instructions than the activation, and all registers of a Blackwell thread.

Where images must be told apart (gate, pool) a tile ends with its image, so the gate is a vector. It multiplies
the weight, the smaller operand, once in a tile.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.ops import triton_common as common
from effnet_kernels.ops.activations import CODES
from effnet_kernels.ops.pointwise_conv_bn_act import fake
from effnet_kernels.ops.triton_common import batch_norm_act, bn_affine, callee, cdiv, dot, narrow, next_power_of_2


def default_config(dtype: torch.dtype, c_in: int, c_out: int, arch: int) -> common.Config:
    """(pixels, output channels, input channels) of a tile; it depends on nothing that changes from call to call.

    Rows are output channels: 64 are what one warpgroup's matrix instruction takes. Where the product narrows, 128, of
    which x is read half as often, unless they leave more rows idle. An expansion of few channels is all epilogue: small
    tiles of 32 rows, of which few are idle. Accumulators of 64 registers a thread leave room for 12 warps on a
    multiprocessor. Measured on an H100 in float16. An expansion of many channels takes 128 rows and 8 warps, two tiles
    on a multiprocessor, unless more than an eighth of its rows were idle: 0.75 of the bytes through the L2, a
    prediction. float32 has no matrix instruction of its own precision: its tiles are what the registers hold.
    """
    rows = min(64, max(16, next_power_of_2(c_out)))
    if dtype == torch.float32:
        return common.Config((64, rows, 16), 4 if rows > 16 or arch < 90 else 2, 2)
    depth = min(64, max(16, next_power_of_2(c_in)))
    if c_in <= 16 and c_out > 32:
        return common.Config((64, 32, depth), 2, 1)
    idle = cdiv(c_out, 128) * 2 - cdiv(c_out, 64)  # blocks of 64 rows that 128 leave idle
    if c_out > 64 and c_in > c_out:
        return common.Config((64, 64 if idle else 128, depth), 4, 3)
    if arch == 90 and 112 <= c_in < c_out and idle * 64 * 8 <= c_out:
        return common.Config((128, 128, depth), 8, 3)
    pixels = 64 if 32 < c_in <= 64 else 256 if rows == 16 and depth <= 32 else 128
    return common.Config((pixels, rows, depth), 4, 1 if pixels == 256 else 3)


SIZES = ("map_pixels", "eps")


@callee
def tile(
    x_ptr, weight_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, gate_ptr, residual_ptr,  # x, gate, residual: the image's
    n, first, map_pixels, eps,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The result for the channels n and BLOCK_M pixels of an image from ``first`` on, float32 [BLOCK_N, BLOCK_M].

    Also which of them exist, and where they are behind the image's first element.
    """
    dtype = x_ptr.dtype.element_ty
    m = first + tl.arange(0, BLOCK_M)
    rows = m.to(tl.int64)
    exact: tl.constexpr = dtype == tl.float32
    early: tl.constexpr = C_IN <= C_OUT  # under way during a short product; a long one needs the registers
    if early:
        scale, shift = bn_affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, n, n < C_OUT, exact)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k0 in range(0, C_IN, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_ok = (k < C_IN)[None, :]
        x = tl.load(x_ptr + rows[:, None] * C_IN + k[None, :], mask=(m < map_pixels)[:, None] & k_ok, other=0.0)
        weight = tl.load(weight_ptr + n[:, None] * C_IN + k[None, :], mask=(n < C_OUT)[:, None] & k_ok, other=0.0)
        if GATE:
            gate = tl.load(gate_ptr + k[None, :], mask=k_ok, other=0.0)
            weight = narrow(weight.to(tl.float32) * gate.to(tl.float32), dtype)
        acc = dot(weight, tl.trans(x), acc)
    if not early:
        scale, shift = bn_affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, n, n < C_OUT, exact)
    y = batch_norm_act(acc, scale[:, None], shift[:, None], ACT, exact)
    mask = (n < C_OUT)[:, None] & (m < map_pixels)[None, :]
    at = rows[None, :] * C_OUT + n[:, None]
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return y, mask, at


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def kernel(
    y_ptr,  # [N, P, C_OUT], with the pool [N, C_OUT]
    x_ptr,  # [N, P, C_IN]
    weight_ptr,  # [C_OUT, C_IN]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr,  # [C_OUT]
    gate_ptr,  # [N, C_IN]
    residual_ptr,  # [N, P, C_OUT]
    map_pixels,  # P; the whole batch is one map where images need not be told apart
    eps,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, ACT: tl.constexpr,
    GATE: tl.constexpr, RESIDUAL: tl.constexpr, POOL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    tiles_n: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    tiles_m = 1 if POOL else tl.cdiv(map_pixels, BLOCK_M)
    program = tl.program_id(0)
    n = (program % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    program = program // tiles_n
    image = (program // tiles_m).to(tl.int64)
    first = (program % tiles_m) * BLOCK_M
    x_ptr += image * map_pixels * C_IN
    if GATE:
        gate_ptr += image * C_IN
    if RESIDUAL:
        residual_ptr += image * map_pixels * C_OUT
    if POOL:
        total = tl.zeros([BLOCK_N], tl.float32)
        while first < map_pixels:  # the interpreter has no range() up to an argument
            y, mask, _ = tile(
                x_ptr, weight_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, gate_ptr, residual_ptr,
                n, first, map_pixels, eps,
                C_IN, C_OUT, ACT, GATE, RESIDUAL, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            total += tl.sum(tl.where(mask, y, 0.0), 1)
            first += BLOCK_M
        total = tl.div_rn(total, map_pixels.to(tl.float32))
        tl.store(y_ptr + image * C_OUT + n, narrow(total, dtype), mask=n < C_OUT)
    else:
        y, mask, at = tile(
            x_ptr, weight_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, gate_ptr, residual_ptr,
            n, first, map_pixels, eps,
            C_IN, C_OUT, ACT, GATE, RESIDUAL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.store(y_ptr + image * map_pixels * C_OUT + at, narrow(y, dtype), mask=mask)


def launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bn: Sequence[Tensor],
    eps: float,
    act: str,
    gate: Tensor | None,
    residual: Tensor | None,
    pool: bool,
) -> None:
    images, c_in, height, width = x.shape
    c_out = weight.shape[0]
    config = common.config("pointwise_conv_bn_act", default_config, (x.dtype, c_in, c_out), x.device)
    block_m, block_n, _ = config.block
    maps, map_pixels = images, height * width
    if gate is None and not pool:
        maps, map_pixels = 1, images * height * width
    rows = maps if pool else maps * cdiv(map_pixels, block_m)
    vectors = common.dense(bn)
    tensors = (
        out,
        common.dense_map(x),
        weight.reshape(c_out, c_in).contiguous(),
        *vectors,
        None if gate is None else gate.contiguous(),
        common.dense_map(residual),
    )
    constants = (c_in, c_out, CODES[act], gate is not None, residual is not None, pool, *config.block)
    common.launch_kernel(kernel, rows * cdiv(c_out, block_n), tensors, (map_pixels, float(eps)), constants, config)


def run(*args) -> Tensor:
    out = fake(*args)
    launch(out, *args)
    return out
