"""``mbconv`` of two backends, each for what it was measured to be faster at: docs/performance.md, "On an H100".

The depthwise convolution, alone or behind its expansion, is CUDA C++'s, but for 3x3 windows at stride 1 on maps of up
to ``SMALL`` pixels; other expansions, gate and projection are Triton's.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.dispatch import Query
from effnet_kernels.ops import mbconv_triton as triton
from effnet_kernels.ops import native_cuda, triton_common
from effnet_kernels.ops import pointwise_conv_bn_act_triton as pointwise_conv_bn_act
from effnet_kernels.ops.common import conv_output_size, empty_nhwc
from effnet_kernels.ops.mbconv import fake
from effnet_kernels.ops.triton_common import dense

SMALL = 14 * 14  # pixels of a result up to which Triton's 3x3 windows at stride 1 were faster


def supports(query: Query) -> tuple[bool, str]:
    if query.dtype not in (torch.float16, torch.bfloat16):
        return False, "only 16 bits have depthwise convolutions on tensor cores"
    served, reason = native_cuda.supports(query)
    return triton_common.supports(query) if served else (served, reason)


def convolve(
    x: Tensor, expand_weight: Tensor | None, expand_bn: Sequence[Tensor], expand_eps: float,
    weight: Tensor, bn: Sequence[Tensor], eps: float, stride: Sequence[int], padding: Sequence[int], act: str,
    with_sums: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What ``triton.convolve`` computes."""
    n, _, h, w = x.shape
    oh, ow = conv_output_size(x.shape, weight, stride, padding)
    if weight.shape[2] == 3 and stride[0] == 1 and oh * ow <= SMALL:
        return triton.convolve(
            x, expand_weight, expand_bn, expand_eps, weight, bn, eps, stride, padding, act, with_sums
        )
    native = torch.ops.effnet_kernels_cuda
    weight, *bn = dense((weight, *bn))
    arguments = (weight, bn, eps, stride, padding, act)
    filtered = empty_nhwc(x, weight.shape[0], oh, ow)
    tiles = -1
    if expand_weight is not None:
        expand_weight, *expand_bn = dense((expand_weight, *expand_bn))
        tiles = native.expand_depthwise_tiles.default(x, expand_weight, expand_bn, expand_eps, *arguments)
        if tiles < 0:
            expanded = empty_nhwc(x, weight.shape[0], h, w)
            pointwise_conv_bn_act.launch(expanded, x, expand_weight, expand_bn, expand_eps, act, None, None, False)
            x, expand_weight = expanded, None
    if tiles < 0:
        tiles = native.expand_depthwise_tiles.default(x, None, [], 0.0, *arguments)
    sums = x.new_empty((n, tiles, weight.shape[0]), dtype=torch.float32) if with_sums else None
    native.expand_depthwise.default(filtered, sums, x, expand_weight, expand_bn, expand_eps, *arguments)
    return filtered, sums


launch = functools.partial(triton.launch, convolve=convolve)


def run(*args: Any) -> Tensor:
    out = fake(*args)
    launch(out, *args)
    return out
