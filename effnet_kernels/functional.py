"""The ops as plain functions: inference-mode BatchNorm, any backend, differentiable.

Conventions shared by all of them:

* Maps are ``[N, C, H, W]`` in float32, float16, bfloat16 or float64, any strides. Channels-last
  memory is native, anything else is converted once; results are always dense channels-last.
* Convolution weights have the dtype of ``x``. BatchNorm and SE parameters have that dtype or
  float32. Sums, BatchNorm, activations and SE are evaluated in float32 (float64 for float64 maps).
* ``stride`` is an int or ``(vertical, horizontal)``. ``padding`` is an int, ``(vertical, horizontal)``
  or ``(top, bottom, left, right)``; None means ``(k - 1) // 2`` on every side. The last form serves
  TensorFlow's "SAME".
* ``act`` is one of identity, relu, relu6, silu, hardswish.
* ``backend`` names a backend, or leaves the choice to ``use_backend`` and the environment ("auto").
* Under autocast, ``x`` and the convolution weights are cast as the stock convolution would cast them.
* Gradients, of any order, come from re-evaluating the reference op; running statistics receive none. The
  transforms of ``torch.func`` have no rules for the ops.

Bad arguments raise InputTypeError (kind, dtype) or InputValueError (shape, range, device) before anything
runs: Python's TypeError and ValueError, and RuntimeError as well, which torch's own ops raise. A backend that
was named but cannot serve raises ValueError or RuntimeError with its reason.
"""

import torch
from torch import Tensor

from effnet_kernels import arguments
from effnet_kernels.arguments import BatchNorm, ConvBN, InputTypeError, InputValueError, Pair, SqueezeExciteWeights
from effnet_kernels.arguments import InputError as InputError
from effnet_kernels.ops.activations import ACTIVATIONS
from effnet_kernels.ops.common import autocast_dtype
from effnet_kernels.ops.depthwise_conv_bn_act import op as _depthwise_conv_bn_act
from effnet_kernels.ops.fused_mbconv import op as _fused_mbconv
from effnet_kernels.ops.mbconv import op as _mbconv
from effnet_kernels.ops.pointwise_conv_bn_act import op as _pointwise_conv_bn_act
from effnet_kernels.ops.squeeze_excite import op as _squeeze_excite
from effnet_kernels.ops.squeeze_excite_gate import op as _squeeze_excite_gate


def pointwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    act: str = "silu",
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    pool: bool = False,
    backend: str = "auto",
) -> Tensor:
    """1x1 convolution, BatchNorm and activation: ``act(bn((x * gate) @ W)) + residual``.

    Args:
        x: ``[N, C_in, H, W]``.
        weight: ``[C_out, C_in, 1, 1]``.
        bn: vectors of ``[C_out]``.
        act: activation.
        gate: ``[N, C_in]``, float32 or the dtype of x, multiplied into x as it is loaded (SE's scale).
        residual: ``[N, C_out, H, W]``, added after the activation.
        pool: return the mean over H and W, the head's global average pool, instead of the map.
        backend: see the module's docstring.

    Returns:
        ``[N, C_out, H, W]``, or ``[N, C_out]`` when pooled; dtype of x.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    arguments.check_map("x", x)
    x, weight = arguments.autocast(x, weight)
    arguments.check_weight("weight", weight, x, (None, x.shape[1], 1, 1))
    arguments.check_bn("bn", bn, weight.shape[0], x)
    arguments.check_choice("act", act, ACTIVATIONS)
    if gate is not None:
        arguments.check_vector("gate", gate, (x.shape[0], x.shape[1]), x)
    if residual is not None:
        residual = residual if autocast_dtype(x) is None else residual.to(x.dtype)
        arguments.check_weight("residual", residual, x, (x.shape[0], weight.shape[0], x.shape[2], x.shape[3]))
    if pool and x.shape[2] * x.shape[3] == 0:
        raise InputValueError(f"x must have at least one pixel to pool, got shape {tuple(x.shape)}")
    return _pointwise_conv_bn_act(x, weight, list(bn[:4]), bn.eps, act, gate, residual, pool, backend)


def depthwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    act: str = "silu",
    *,
    stride: Pair = 1,
    padding: Pair | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution, BatchNorm and activation, and the channel means of the result.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C, 1, KH, KW]``.
        bn: vectors of ``[C]``.
        act, stride, padding, backend: see the module's docstring.

    Returns:
        The map ``[N, C, OH, OW]`` in the dtype of x, and its means ``[N, C]`` in float32: the
        squeeze of squeeze-and-excitation, taken in the same pass before rounding to x's dtype.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    arguments.check_map("x", x)
    x, weight = arguments.autocast(x, weight)
    arguments.check_weight("weight", weight, x, (x.shape[1], 1, None, None))
    arguments.check_bn("bn", bn, x.shape[1], x)
    arguments.check_choice("act", act, ACTIVATIONS)
    stride, padding = arguments.window(x.shape, weight, stride, padding)
    return _depthwise_conv_bn_act(x, weight, list(bn[:4]), bn.eps, stride, padding, act, True, backend)


def squeeze_excite_gate(mean: Tensor, se: SqueezeExciteWeights, *, backend: str = "auto") -> Tensor:
    """The gate of squeeze-and-excitation from channel means: ``gate(W2 @ act(W1 @ mean + b1) + b2)``.

    Args:
        mean: ``[N, C]`` float32 (or float64).
        se: the two fully connected layers, in that dtype or a 16-bit one.
        backend: see the module's docstring.

    Returns:
        ``[N, C]`` in the dtype of ``mean``; give it to ``pointwise_conv_bn_act`` as ``gate``.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    if not isinstance(mean, Tensor) or mean.dim() != 2:
        raise InputValueError(f"mean must be a tensor of shape [N, C], got {arguments.describe(mean)}")
    if mean.dtype not in (torch.float32, torch.float64):
        raise InputTypeError(f"mean must be float32 or float64, got {mean.dtype}")
    arguments.check_se("se", se, mean, mean.shape[1], (torch.float16, torch.bfloat16))
    return _squeeze_excite_gate(mean, list(se[:4]), se.act, se.gate, backend)


def squeeze_excite(x: Tensor, se: SqueezeExciteWeights, *, backend: str = "auto") -> Tensor:
    """Squeeze-and-excitation on its own: ``x * squeeze_excite_gate(mean(x))``.

    Args:
        x: ``[N, C, H, W]``.
        se: the two fully connected layers.
        backend: see the module's docstring.

    Returns:
        ``[N, C, H, W]`` in the dtype of x.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    arguments.check_map("x", x)
    (x,) = arguments.autocast(x)
    if x.shape[2] * x.shape[3] == 0:
        raise InputValueError(f"x must have at least one pixel, got shape {tuple(x.shape)}")
    arguments.check_se("se", se, x, x.shape[1])
    return _squeeze_excite(x, list(se[:4]), se.act, se.gate, backend)


def fused_mbconv(
    x: Tensor,
    expand: ConvBN,
    project: ConvBN | None = None,
    act: str = "silu",
    *,
    stride: Pair = 1,
    padding: Pair | None = None,
    residual: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Fused-MBConv (https://arxiv.org/abs/2104.00298): dense convolution, BN, act, then a 1x1 projection.

    Without ``project`` it is a plain convolution with BatchNorm and activation, as in the stem and in
    blocks of expansion 1.

    Args:
        x: ``[N, C_in, H, W]``.
        expand: weight ``[C_mid, C_in, KH, KW]`` and its BatchNorm.
        project: weight ``[C_out, C_mid, 1, 1]`` and its BatchNorm; no activation follows it.
        residual: add x at the end; needs an output of x's shape.
        act, stride, padding, backend: see the module's docstring.

    Returns:
        ``[N, C_out, OH, OW]`` (``C_mid`` channels without ``project``) in the dtype of x.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    arguments.check_map("x", x)
    x, weight, project_weight = arguments.autocast(x, expand.weight, project.weight if project else None)
    arguments.check_weight("expand.weight", weight, x, (None, x.shape[1], None, None))
    arguments.check_bn("expand.bn", expand.bn, weight.shape[0], x)
    arguments.check_choice("act", act, ACTIVATIONS)
    if project is not None:
        arguments.check_weight("project.weight", project_weight, x, (None, weight.shape[0], 1, 1))
        arguments.check_bn("project.bn", project.bn, project_weight.shape[0], x)
    stride, padding = arguments.window(x.shape, weight, stride, padding)
    if residual:
        out = weight if project is None else project_weight
        arguments.check_residual(x, out.shape[0], weight, stride, padding)
    return _fused_mbconv(
        x, weight, list(expand.bn[:4]), expand.bn.eps, stride, padding, act,
        project_weight, [] if project is None else list(project.bn[:4]), 0.0 if project is None else project.bn.eps,
        residual, backend,
    )  # fmt: skip


def mbconv(
    x: Tensor,
    expand: ConvBN | None,
    depthwise: ConvBN,
    se: SqueezeExciteWeights | None,
    project: ConvBN,
    act: str = "silu",
    *,
    stride: Pair = 1,
    padding: Pair | None = None,
    project_act: str = "identity",
    residual: bool = False,
    backend: str = "auto",
) -> Tensor:
    """MBConv (https://arxiv.org/abs/1801.04381, https://arxiv.org/abs/1905.11946) as one op.

    Expand 1x1, depthwise, squeeze-and-excitation, project 1x1; BatchNorm after each convolution and
    ``act`` after the first two. Without ``expand`` it is the depthwise-separable block.

    Args:
        x: ``[N, C_in, H, W]``.
        expand: weight ``[C_mid, C_in, 1, 1]`` and its BatchNorm, or None where C_mid is C_in.
        depthwise: weight ``[C_mid, 1, KH, KW]`` and its BatchNorm.
        se: the SE layers over ``C_mid`` channels, or None.
        project: weight ``[C_out, C_mid, 1, 1]`` and its BatchNorm.
        project_act: activation after the projection, before the residual.
        residual: add x at the end; needs an output of x's shape.
        act, stride, padding, backend: see the module's docstring.

    Returns:
        ``[N, C_out, OH, OW]`` in the dtype of x.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    arguments.check_map("x", x)
    x, expand_weight, weight, project_weight = arguments.autocast(
        x, expand.weight if expand else None, depthwise.weight, project.weight
    )
    mid = x.shape[1]
    if expand is not None:
        arguments.check_weight("expand.weight", expand_weight, x, (None, x.shape[1], 1, 1))
        mid = expand_weight.shape[0]
        arguments.check_bn("expand.bn", expand.bn, mid, x)
    arguments.check_weight("depthwise.weight", weight, x, (mid, 1, None, None))
    arguments.check_bn("depthwise.bn", depthwise.bn, mid, x)
    arguments.check_weight("project.weight", project_weight, x, (None, mid, 1, 1))
    arguments.check_bn("project.bn", project.bn, project_weight.shape[0], x)
    if se is not None:
        arguments.check_se("se", se, x, mid)
    arguments.check_choice("act", act, ACTIVATIONS)
    arguments.check_choice("project_act", project_act, ACTIVATIONS)
    stride, padding = arguments.window(x.shape, weight, stride, padding)
    if residual:
        arguments.check_residual(x, project_weight.shape[0], weight, stride, padding)
    return _mbconv(
        x, expand_weight, [] if expand is None else list(expand.bn[:4]), 0.0 if expand is None else expand.bn.eps,
        weight, list(depthwise.bn[:4]), depthwise.bn.eps, stride, padding, act,
        [] if se is None else list(se[:4]), "identity" if se is None else se.act, "sigmoid" if se is None else se.gate,
        project_weight, list(project.bn[:4]), project.bn.eps, project_act, residual, backend,
    )  # fmt: skip
