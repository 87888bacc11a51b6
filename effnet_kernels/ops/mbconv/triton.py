"""``mbconv`` in Triton: expand, depthwise with sums, gate, project. Launches of the other ops' kernels.

The expanded map is written and read twice, 4 C_mid elements per pixel at stride 1, beside x and the result: the traffic
called L2 in docs/performance.md. SE costs a launch or two but no pass over a map: the depthwise convolution leaves
sums, the projection multiplies the gate in.

Micro-batches: with ``L2_SHARE`` above 0 the block runs on slices of the batch, one after the other, whose expanded maps
fit that share of the GPU's L2 and live in the same memory, so that they need not go out to DRAM. The results have the
same bits. Off until it is measured to pay.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.ops.common import conv_output_size, empty_nhwc, to_nhwc
from effnet_kernels.ops.depthwise_conv_bn_act import triton as depthwise_conv_bn_act
from effnet_kernels.ops.mbconv.op import fake
from effnet_kernels.ops.pointwise_conv_bn_act import triton as pointwise_conv_bn_act
from effnet_kernels.ops.squeeze_excite_gate import triton as squeeze_excite_gate
from effnet_kernels.ops.triton_common import supports

__all__ = ["L2_SHARE", "convolve", "images_per_slice", "launch", "run", "supports"]

# Share of the L2 that the expanded maps of a slice may take; 0 runs the whole batch at once.
L2_SHARE = float(os.environ.get("EFFNET_KERNELS_L2_SHARE", "0"))


def images_per_slice(images: int, bytes_per_image: int, l2_bytes: int, share: float) -> int:
    """As many images as fit, evenly spread over the slices; all at once where not even one fits."""
    fitting = int(share * l2_bytes) // max(1, bytes_per_image)
    if fitting == 0 or fitting >= images:
        return images
    slices = -(-images // fitting)
    return -(-images // slices)


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """Size of the GPU's L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def convolve(
    x: Tensor, expand_weight: Tensor | None, expand_bn: Sequence[Tensor], expand_eps: float,
    weight: Tensor, bn: Sequence[Tensor], eps: float, stride: Sequence[int], padding: Sequence[int], act: str,
    with_sums: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Expansion and depthwise convolution: the filtered map, and the sums of its tiles, [N, tiles, C_mid]."""
    h, w = x.shape[2:]
    mid = weight.shape[0]
    oh = conv_output_size(h, weight.shape[2], stride[0], padding[0], padding[1])
    ow = conv_output_size(w, weight.shape[3], stride[1], padding[2], padding[3])
    expanded = x
    if expand_weight is not None:
        expanded = empty_nhwc(x, mid, h, w)
        pointwise_conv_bn_act.launch(expanded, x, expand_weight, expand_bn, expand_eps, act, None, None, False)
    filtered = empty_nhwc(x, mid, oh, ow)
    sums = depthwise_conv_bn_act.launch_sums(filtered, expanded, weight, bn, eps, stride, padding, act, with_sums)
    return filtered, sums


def launch(
    out: Tensor, x: Tensor, expand_weight: Tensor | None, expand_bn: Sequence[Tensor], expand_eps: float,
    weight: Tensor, bn: Sequence[Tensor], eps: float, stride: Sequence[int], padding: Sequence[int], act: str,
    se: Sequence[Tensor], se_act: str, se_gate: str,
    project_weight: Tensor, project_bn: Sequence[Tensor], project_eps: float, project_act: str, residual: bool,
    convolve: Callable[..., tuple[Tensor, Tensor | None]] = convolve,
) -> None:  # fmt: skip
    """Fill out. ``convolve``: what computes the first two convolutions."""
    x = to_nhwc(x)
    n, _, h, w = x.shape
    mid, (oh, ow) = weight.shape[0], out.shape[2:]
    images = n
    if L2_SHARE > 0:
        pixels = oh * ow + (0 if expand_weight is None else h * w)
        images = images_per_slice(n, mid * pixels * x.element_size(), l2_bytes(x.device), L2_SHARE)

    for first in range(0, n, max(1, images)):
        part, y = (x, out) if images == n else (x[first : first + images], out[first : first + images])
        filtered, sums = convolve(
            part, expand_weight, expand_bn, expand_eps, weight, bn, eps, stride, padding, act, bool(se)
        )
        gate = None
        if sums is not None:
            gate = sums.new_empty((len(part), mid))
            squeeze_excite_gate.launch_sums(gate, sums, oh * ow, se, se_act, se_gate)
        shortcut = part if residual else None
        pointwise_conv_bn_act.launch(
            y, filtered, project_weight, project_bn, project_eps, project_act, gate, shortcut, False
        )


def run(*args: Any) -> Tensor:
    out = fake(*args)
    launch(out, *args)
    return out
