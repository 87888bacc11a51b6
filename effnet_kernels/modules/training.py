"""Plans in training: BatchNorms by the statistics of the batch, running buffers updated, gradients wanted."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import effnet_kernels.functional as F
from effnet_kernels.backends import Problem, serves
from effnet_kernels.modules.reading import Geometry, padding_for
from effnet_kernels.training import ConvBNAct, conv_block, update_running_statistics


class Chain(NamedTuple):
    """A plan as ``training.conv_block`` takes it."""

    layers: Sequence[tuple[F.ConvBN, Geometry | None, str]]  # geometry None: 1x1
    se: F.SqueezeExciteWeights | None = None
    pool: bool = False

    def tensors(self) -> list[Tensor]:
        """Everything that may want a gradient."""
        parameters = [t for (weight, bn), _, _ in self.layers for t in (weight, bn.gamma, bn.beta)]
        return parameters if self.se is None else [*parameters, *self.se[:4]]


def wants_gradients(chain: Chain, x: Tensor) -> bool:
    """Whether backward will come to this block."""
    return torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in chain.tensors()))


def train(
    chain: Chain, x: Tensor, dtype: torch.dtype, norms: Sequence[nn.BatchNorm2d], residual: bool, backend: str
) -> Tensor | None:
    """Run the chain; None where no backend does better than the stock forward, or where that has to raise.

    ``norms``: the BatchNorms in training mode; the others normalise by their running statistics. ``dtype``: that of
    the convolutions. ``residual``: add x at the end.
    """
    if x.dim() != 4 or not serves(Problem("conv_block_train", x.device.type, dtype), backend):
        return None
    size, layers, trained = list(x.shape), [], []
    for (weight, bn), geometry, act in chain.layers:
        norm = next((m for m in norms if m._parameters["weight"] is bn.gamma), None)
        stride: tuple[int, int] = (1, 1)
        padding: tuple[int, ...] | None = None
        if geometry is not None:
            _, stride, _ = geometry
            padding = padding_for(geometry, size)
        layer = ConvBNAct(weight, bn, act, stride, padding, frozen=norm is None)
        size = layer.output_size(size)
        values = size[0] * size[2] * size[3]
        if values <= int(norm is not None):  # nothing to compute, or nothing to take statistics of: torch's own error
            return None
        layers.append(layer)
        trained.append((norm, values))
    y, statistics = conv_block(x, layers, chain.se, residual=x if residual else None, pool=chain.pool, backend=backend)
    for (norm, values), measured in zip(trained, statistics, strict=True):
        if norm is not None:
            update_running_statistics(norm, measured, values)
    return y
