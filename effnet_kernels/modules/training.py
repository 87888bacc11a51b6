"""Plans in training: BatchNorms by the statistics of the batch, running buffers updated, gradients wanted."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import effnet_kernels.functional as F
from effnet_kernels.dispatch import place, serves
from effnet_kernels.modules.reading import Geometry, padding_for
from effnet_kernels.training import ConvBNAct, conv_block, update_running_statistics


class Chain(NamedTuple):
    """A plan as ``training.conv_block`` takes it."""

    layers: Sequence[tuple[F.ConvBN, Geometry | None, str]]  # geometry None: 1x1
    norms: Sequence[nn.BatchNorm2d]  # one per layer
    se: F.SqueezeExciteWeights | None = None
    pool: bool = False

    def tensors(self) -> list[Tensor]:
        """Everything that may want a gradient."""
        parameters = [t for (weight, bn), _, _ in self.layers for t in (weight, bn.gamma, bn.beta)]
        return parameters if self.se is None else [*parameters, *self.se[:4]]


def wants_gradients(chain: Callable[[], Chain | None], x: Tensor) -> bool:
    """Whether backward will come to this block; an exported program has the ops of inference."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    made = chain()
    return x.requires_grad or made is None or any(t.requires_grad for t in made.tensors())


def train(chain: Chain, x: Tensor, dtype: torch.dtype, residual: bool, backend: str) -> Tensor | None:
    """Run the chain; None where no backend does better than the stock forward, or where that has to raise.

    BatchNorms in eval mode normalise by their running statistics. ``dtype``: that of the convolutions.
    ``residual``: add x at the end.
    """
    if x.dim() != 4 or not serves(backend, "conv_block_train", place(x), dtype):
        return None
    size, layers, counts = list(x.shape), [], []
    for ((weight, bn), geometry, act), norm in zip(chain.layers, chain.norms, strict=True):
        stride: tuple[int, int] = (1, 1)
        padding: tuple[int, ...] | None = None
        if geometry is not None:
            _, stride, _ = geometry
            padding = padding_for(geometry, size)
        layer = ConvBNAct(weight, bn, act, stride, padding, frozen=not norm.training)
        size = layer.output_size(size)
        values = size[0] * size[2] * size[3]
        if values <= int(norm.training):  # nothing to compute, or nothing to take statistics of: torch's own error
            return None
        layers.append(layer)
        counts.append(values)
    y, statistics = conv_block(x, layers, chain.se, residual=x if residual else None, pool=chain.pool, backend=backend)
    for norm, measured, values in zip(chain.norms, statistics, counts, strict=True):
        if norm.training and norm.track_running_stats:
            update_running_statistics(norm, measured, values)
    return y
