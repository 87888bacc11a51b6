"""The ops in training: BatchNorm by the statistics of the batch, with gradients, as plain functions.

Maps, dtypes, strides and padding are those of ``effnet_kernels.functional``. Forward keeps the inputs of the
convolutions' BatchNorms and nothing that can be computed from them (docs/training.md has the bytes); nothing is kept
or computed for parameters that need no gradient.

Statistics of the batch are returned, not stored: ``update_running_statistics`` does what BatchNorm does with them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels import arguments
from effnet_kernels import functional as F
from effnet_kernels.ops.activations import ACTIVATIONS
from effnet_kernels.ops.common import autocast_dtype, conv_output_size, to_nhwc
from effnet_kernels.ops.conv_block_train import conv_block_train as _conv_block_train


class ConvBNAct(NamedTuple):
    """A bias-free convolution, its BatchNorm and the activation behind it.

    ``weight`` is ``[O, C, KH, KW]``, or ``[C, 1, KH, KW]`` for a depthwise convolution.
    With ``frozen`` the running statistics normalise, as in eval mode. Stride and padding as in ``functional``.
    """

    weight: Tensor
    bn: F.BatchNorm
    act: str = "silu"
    stride: F.Pair = 1
    padding: F.Pair | None = None
    frozen: bool = False

    def geometry(self, size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Stride (vertical, horizontal) and padding (top, bottom, left, right) on an input ``[N, C, H, W]``."""
        return arguments.window(size, self.weight, self.stride, self.padding)

    def output_size(self, size: Sequence[int]) -> list[int]:
        """``[N, O, OH, OW]`` from the size of the input."""
        return [size[0], self.weight.shape[0], *conv_output_size(size, self.weight, *self.geometry(size))]


def conv_block(
    x: Tensor,
    layers: Sequence[ConvBNAct],
    se: F.SqueezeExciteWeights | None = None,
    *,
    residual: Tensor | None = None,
    pool: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, list[Tensor]]:
    """A chain of convolutions with BatchNorm and activation: any block of an EfficientNet in training.

    Args:
        x: ``[N, C, H, W]``.
        layers: one after the other.
        se: squeeze-and-excitation in front of the last layer.
        residual: ``[N, C_out, OH, OW]``, added at the end.
        pool: return the means over H and W, ``[N, C_out]``, instead of the map; not with ``residual``.
        backend: see ``functional``.

    Returns:
        The map ``[N, C_out, OH, OW]`` in the dtype of x, channels-last, and for every layer ``[2, C]`` with the mean
        and the biased variance that it was normalised by (float32; float64 for float64 maps).

    Raises:
        TypeError, ValueError: as ``functional``; ValueError too for statistics over a single value per channel.
    """
    arguments.check_map("x", x)
    x, *weights = arguments.autocast(x, *(layer.weight for layer in layers))
    if not layers:
        raise F.InputValueError("layers must not be empty")
    if se is not None and len(layers) < 2:
        raise F.InputValueError("se needs a layer in front of the last one")
    if pool and residual is not None:
        raise F.InputValueError("pool and residual exclude each other")
    x = to_nhwc(x)
    shape, geometry = list(x.shape), []
    for i, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        name = f"layers[{i}]"
        arguments.check_choice(f"{name}.act", layer.act, ACTIVATIONS)
        depthwise = isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[1] == 1 != shape[1]
        wanted = (shape[1], 1, None, None) if depthwise else (None, shape[1], None, None)
        arguments.check_weight(f"{name}.weight", weight, x, wanted)
        stride, padding = layer.geometry(shape)
        shape = layer.output_size(shape)
        arguments.check_bn(f"{name}.bn", layer.bn, shape[1], x)
        if se is not None and i == len(layers) - 2:
            arguments.check_se("se", se, x, shape[1])
        values = shape[0] * shape[2] * shape[3]
        if not layer.frozen and values == 1:
            got = torch.Size(shape)  # torch's own words
            raise F.InputValueError(f"Expected more than 1 value per channel when training, got input size {got}")
        geometry += stride + padding
    if pool and shape[2] * shape[3] == 0:
        raise F.InputValueError(f"x must have at least one pixel to pool, got shape {tuple(x.shape)}")
    if residual is not None:
        residual = residual if autocast_dtype(x) is None else residual.to(x.dtype)
        arguments.check_weight("residual", residual, x, tuple(shape))
        residual = to_nhwc(residual)
    return _conv_block_train(
        x, weights, [v for layer in layers for v in layer.bn[:4]],
        [layer.bn.eps for layer in layers], [layer.frozen for layer in layers], [layer.act for layer in layers],
        geometry, [] if se is None else list(se[:4]), "identity" if se is None else se.act,
        "sigmoid" if se is None else se.gate, residual, pool, backend,
    )  # fmt: skip


@torch.no_grad()
def update_running_statistics(bn: nn.BatchNorm2d, statistics: Tensor, values: int) -> None:
    """What BatchNorm in training does to its buffers, given ``[2, C]`` mean and biased variance of ``values`` values.

    The running variance is that of the unbiased one; with ``momentum=None`` both are cumulative averages. As torch's
    BatchNorm, it leaves their versions as they are: what was computed from them before can still be differentiated.
    """
    momentum = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    if momentum is None:
        momentum = 0.0
    mean, var = statistics.unbind()
    running_mean, running_var = bn.running_mean, bn.running_var
    assert running_mean is not None
    assert running_var is not None
    if not torch.compiler.is_compiling():  # which knows no versions
        running_mean, running_var = running_mean.data, running_var.data
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(var, alpha=momentum * values / (values - 1))
