"""``pointwise_conv_bn_act`` in Triton: a GEMM over [pixels, C_in] with everything else in its prologue and epilogue.

Designed for one read of x and of the residual and one write of y: ``e P (C_in + C_out [+ C_out])`` bytes for P pixels of
element size e. Programs that share pixels are neighbours in the grid, so that only the first of them looks for x
outside the L2; the weight stays there. With the pool, y is never written: one program owns all pixels of an image for
its channels and adds them up in order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.ops import triton_common as common
from effnet_kernels.ops.activations import CODES
from effnet_kernels.ops.pointwise_conv_bn_act.op import fake
from effnet_kernels.ops.triton_common import activate, bn_affine, cdiv, dot, narrow, next_power_of_2

supports = common.supports


def default_config(dtype: torch.dtype, c_in: int, c_out: int, generation: int) -> common.Config:
    """(pixels, output channels, input channels) of a tile; it depends on nothing that changes from call to call.

    Of 64 and 128 output channels, those which leave fewer columns of the matrix unit idle, and 128 if equal. float32
    has no matrix instruction of its own precision: its tiles are what the registers hold.
    """
    width = min(64, max(16, next_power_of_2(c_out)))
    if dtype == torch.float32:
        return common.Config((64, width, 16), 4, 2)
    if c_out > 64 and cdiv(c_out, 128) * 128 <= cdiv(c_out, 64) * 64:
        width = 128
    depth = min(64, max(16, next_power_of_2(c_in)))
    return common.Config((128, width, depth), 8 if width == 128 else 4, 3)


SIZES = ("pixels", "map_pixels", "eps")


@triton.jit
def tile(
    x_ptr, weight_ptr, gate_ptr, scale, shift, first, n, pixels, map_pixels,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, POOL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act(bn((x * gate) @ W)) of the pixels from ``first`` on and the channels ``n``, float32."""
    m = tl.arange(0, BLOCK_M)
    x_ptr += (first + m.to(tl.int64)) * C_IN
    if GATE and not POOL:
        image = first // map_pixels
        within = (first - image * map_pixels).to(tl.int32) + m
        gate_ptr += (image + within // map_pixels) * C_IN
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, C_IN, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = (first + m < pixels)[:, None] & (k < C_IN)[None, :]
        x = tl.load(x_ptr[:, None] + k[None, :], mask=mask, other=0.0)
        if GATE:
            if POOL:
                gate = tl.load(gate_ptr + k, mask=k < C_IN, other=0.0)[None, :]
            else:
                gate = tl.load(gate_ptr[:, None] + k[None, :], mask=mask, other=0.0)
            x = narrow(x.to(tl.float32) * gate.to(tl.float32), x.dtype)
        mask = (k < C_IN)[:, None] & (n < C_OUT)[None, :]
        weight = tl.load(weight_ptr + n[None, :] * C_IN + k[:, None], mask=mask, other=0.0)
        acc = dot(x, weight, acc)
    return activate(acc * scale[None, :] + shift[None, :], ACT, x_ptr.dtype.element_ty == tl.float32)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def kernel(
    y_ptr,  # [P, C_OUT], with the pool [N, C_OUT]
    x_ptr,  # [P, C_IN]
    weight_ptr,  # [C_OUT, C_IN]
    gamma_ptr,
    beta_ptr,
    mean_ptr,
    var_ptr,
    gate_ptr,  # [N, C_IN]
    residual_ptr,  # [P, C_OUT]
    pixels,  # P = N H W
    map_pixels,  # H W
    eps,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    dtype = x_ptr.dtype.element_ty
    program = tl.program_id(0)
    n = (program % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (program // tiles_n).to(tl.int64)  # of tiles, or of images
    scale, shift = bn_affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, n, n < C_OUT)
    m = tl.arange(0, BLOCK_M)
    if POOL:
        x_ptr += row * map_pixels * C_IN
        if GATE:
            gate_ptr += row * C_IN
        if RESIDUAL:
            residual_ptr += row * map_pixels * C_OUT
        total = tl.zeros([BLOCK_N], tl.float32)
        first = 0
        while first < map_pixels:  # the interpreter has no range() up to an argument
            y = tile(
                x_ptr, weight_ptr, gate_ptr, scale, shift, first, n, map_pixels, map_pixels,
                C_IN, C_OUT, ACT, GATE, POOL, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            mask = (first + m < map_pixels)[:, None] & (n < C_OUT)[None, :]
            if RESIDUAL:
                at = (first + m.to(tl.int64))[:, None] * C_OUT + n[None, :]
                y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(mask, y, 0.0), 0)
            first += BLOCK_M
        tl.store(y_ptr + row * C_OUT + n, narrow(tl.div_rn(total, map_pixels.to(tl.float32)), dtype), mask=n < C_OUT)
    else:
        first = row * BLOCK_M
        y = tile(
            x_ptr, weight_ptr, gate_ptr, scale, shift, first, n, pixels, map_pixels,
            C_IN, C_OUT, ACT, GATE, POOL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        mask = (first + m < pixels)[:, None] & (n < C_OUT)[None, :]
        at = (first + m)[:, None] * C_OUT + n[None, :]
        if RESIDUAL:
            y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, narrow(y, dtype), mask=mask)


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
    rows = images if pool else cdiv(images * height * width, block_m)
    vectors = common.dense(bn)
    tensors = (
        out,
        common.dense_map(x),
        weight.reshape(c_out, c_in).contiguous(),
        *vectors,
        None if gate is None else gate.contiguous(),
        common.dense_map(residual),
    )
    sizes = (images * height * width, height * width, eps)
    constants = (c_in, c_out, CODES[act], gate is not None, residual is not None, pool, *config.block)
    common.launch_kernel(kernel, rows * cdiv(c_out, block_n), tensors, sizes, constants, config)


def run(*args) -> Tensor:  # type: ignore[no-untyped-def]
    out = fake(*args)
    launch(out, *args)
    return out
