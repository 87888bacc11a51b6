"""Problems taken from the real networks: every block of a model with the map it sees, and the ops inside.

A model is built on the meta device and run once under hooks, so the list cannot drift from the network.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from effnet_kernels.benchmarking.models import require

# timm's names; the sizes are those of the published models (V2-L trains at 384 and is used at 480).
MODELS = {
    "efficientnet_lite0": 224,
    "efficientnet_b0": 224,
    "efficientnet_b4": 380,
    "efficientnet_b7": 600,
    "tf_efficientnetv2_s": 300,
    "tf_efficientnetv2_m": 480,
    "tf_efficientnetv2_l": 480,
}
# Without options: the smallest of each family.
DEFAULT_MODELS = ("efficientnet_b0", "tf_efficientnetv2_s")
BLOCKS = {
    "InvertedResidual": "mbconv",
    "DepthwiseSeparableConv": "mbconv",
    "EdgeResidual": "fused_mbconv",
    "ConvBnAct": "fused_mbconv",  # without projection
}


class OpShape(NamedTuple):
    """One op of section "ops" of docs/design.md on one map; `count` times in the network."""

    kind: str  # pointwise | depthwise | squeeze_excite | fused
    channels: tuple[int, int]  # in, out; for squeeze_excite the map's and the reduced ones
    size: int  # of the input map
    kernel: int = 1
    stride: int = 1
    mid: int = 0  # fused: expanded channels; without them it is a dense convolution alone

    def __str__(self) -> str:
        inner = f"-{self.mid}" if self.mid else ""
        return f"{self.kind} {self.channels[0]}{inner}-{self.channels[1]} @{self.size} k{self.kernel} s{self.stride}"

    def bytes(self, batch: int, element: int) -> int:
        """The least traffic: input, output and weights once each (the stand-alone SE: map in, map out)."""
        c_in, c_out = self.channels
        out_size = -(-self.size // self.stride)
        if self.kind == "squeeze_excite":
            return element * (2 * batch * c_in * self.size**2 + 2 * c_in * c_out)
        maps = batch * (c_in * self.size**2 + c_out * out_size**2)
        if self.kind == "depthwise":
            weights = c_in * self.kernel**2
        elif self.kind == "fused":
            weights = c_in * (self.mid or c_out) * self.kernel**2 + self.mid * c_out
        else:
            weights = c_in * c_out
        return element * (maps + weights)


class Block(NamedTuple):
    """One block of the network: its place, kind and input map."""

    path: str
    kind: str  # mbconv | fused_mbconv
    channels: tuple[int, int]
    size: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        return f"{self.kind} {self.channels[0]}-{self.channels[1]} @{self.size} k{self.kernel} s{self.stride}"

    def bytes(self, batch: int, element: int) -> int:
        """The least traffic of the whole block on chip: input and output once each."""
        out_size = -(-self.size // self.stride)
        return element * batch * (self.channels[0] * self.size**2 + self.channels[1] * out_size**2)


def blocks(model: str, size: int | None = None) -> dict[Block, int]:
    """The distinct blocks of a timm model, first occurrence each, and how often the network has them."""
    seen: dict[tuple, list] = {}
    for path, block, x, y in _visit(model, size, tuple(BLOCKS)):
        spatial = next(getattr(block, name) for name in ("conv_exp", "conv_dw", "conv") if hasattr(block, name))
        found = Block(path, BLOCKS[type(block).__name__], (x[1], y[1]), x[2], spatial.kernel_size[0], spatial.stride[0])
        seen.setdefault((*found[1:], spatial.out_channels), []).append(found)
    return {same[0]: len(same) for same in seen.values()}


def ops(model: str, size: int | None = None) -> dict[OpShape, int]:
    """The distinct ops inside the blocks of a timm model, and how often the network has them."""
    found: Counter[OpShape] = Counter()
    for _, block, x, y in _visit(model, size, tuple(BLOCKS)):
        if hasattr(block, "conv_exp"):
            conv = block.conv_exp
            found[OpShape("fused", (x[1], y[1]), x[2], conv.kernel_size[0], conv.stride[0], conv.out_channels)] += 1
            continue
        if hasattr(block, "conv"):
            found[OpShape("fused", (x[1], y[1]), x[2], block.conv.kernel_size[0], block.conv.stride[0])] += 1
            continue
        conv = block.conv_dw
        out_size = y[2]
        if hasattr(block, "conv_pwl"):
            found[OpShape("pointwise", (x[1], conv.in_channels), x[2])] += 1
        project = getattr(block, "conv_pwl", block.conv_pw)
        found[
            OpShape("depthwise", (conv.in_channels, conv.in_channels), x[2], conv.kernel_size[0], conv.stride[0])
        ] += 1
        found[OpShape("pointwise", (project.in_channels, project.out_channels), out_size)] += 1
        if hasattr(block.se, "conv_reduce"):
            found[OpShape("squeeze_excite", (conv.in_channels, block.se.conv_reduce.out_channels), out_size)] += 1
    return dict(found)


def network_bytes(model: str, size: int, batch: int, element: int) -> int:
    """The least traffic of one kernel per convolution, or per block of two dense ones: its maps once each.

    Squeeze-and-excitation, which is folded into its neighbours, and weights are not counted.
    """
    visited = list(_visit(model, size, ("EdgeResidual", "Conv2d", "Conv2dSame")))
    blocks = tuple(f"{path}." for path, module, *_ in visited if type(module).__name__ == "EdgeResidual")
    maps = [shape for path, _, x, y in visited if not path.startswith(blocks) and x[2] > 1 for shape in (x, y)]
    return batch * element * sum(math.prod(shape[1:]) for shape in maps)


def largest(problems: dict, limit: int | None) -> list:
    """The ``limit`` problems of each kind that move the most bytes in the network; all where it is None."""
    ranked = sorted(problems, key=lambda problem: -problem.bytes(1, 4) * problems[problem])
    kinds = Counter()
    kept = []
    for problem in ranked:
        kinds[problem.kind] += 1
        if limit is None or kinds[problem.kind] <= limit:
            kept.append(problem)
    return kept


def _visit(model: str, size: int | None, classes: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, tuple, tuple]]:
    """(path, module, input shape, output shape) of every module whose class has one of the names."""
    size = size or MODELS[model]
    visited = []
    timm = require("timm", "timm")
    with torch.device("meta"):
        network = timm.create_model(model).eval()
        for path, module in network.named_modules():
            if type(module).__name__ in classes:
                module.register_forward_hook(
                    lambda module, inputs, output, path=path: visited.append(
                        (path, module, tuple(inputs[0].shape), tuple(output.shape))
                    )
                )
        with torch.inference_mode():
            network(torch.empty(1, 3, size, size))
    yield from visited
