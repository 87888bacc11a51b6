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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels import internals
from effnet_kernels.ops.activations import ACTIVATIONS, GATES
from effnet_kernels.ops.common import autocast_dtype
from effnet_kernels.ops.depthwise_conv_bn_act import op as _depthwise_conv_bn_act
from effnet_kernels.ops.fused_mbconv import op as _fused_mbconv
from effnet_kernels.ops.mbconv import op as _mbconv
from effnet_kernels.ops.pointwise_conv_bn_act import op as _pointwise_conv_bn_act
from effnet_kernels.ops.recording import converted
from effnet_kernels.ops.squeeze_excite import op as _squeeze_excite
from effnet_kernels.ops.squeeze_excite_gate import op as _squeeze_excite_gate

Pair = int | Sequence[int]


class InputError(RuntimeError):
    """An argument that an op does not take."""


class InputValueError(InputError, ValueError):
    """One of a wrong shape, range or device."""


class InputTypeError(InputError, TypeError):
    """One of a wrong kind or dtype."""


class BatchNorm(NamedTuple):
    """Inference-mode batch normalisation: four vectors of ``[C]`` and the epsilon.

    ``gamma * (y - running_mean) / sqrt(running_var + eps) + beta``
    (Ioffe and Szegedy, https://arxiv.org/abs/1502.03167).
    """

    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float = 1e-5


class ConvBN(NamedTuple):
    """A bias-free convolution weight and the BatchNorm behind it."""

    weight: Tensor
    bn: BatchNorm


class SqueezeExciteWeights(NamedTuple):
    """The two 1x1 convolutions of squeeze-and-excitation (https://arxiv.org/abs/1709.01507).

    ``w_reduce [R, C, 1, 1]``, ``b_reduce [R]``, ``w_expand [C, R, 1, 1]``, ``b_expand [C]``;
    ``act`` stands between them, ``gate`` (sigmoid or hardsigmoid) behind them.
    """

    w_reduce: Tensor
    b_reduce: Tensor
    w_expand: Tensor
    b_expand: Tensor
    act: str = "silu"
    gate: str = "sigmoid"


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
    _check_map("x", x)
    x, weight = _autocast(x, weight)
    _check_weight("weight", weight, x, (None, x.shape[1], 1, 1))
    _check_bn("bn", bn, weight.shape[0], x)
    _check_choice("act", act, ACTIVATIONS)
    if gate is not None:
        _check_vector("gate", gate, (x.shape[0], x.shape[1]), x)
    if residual is not None:
        residual = residual if autocast_dtype(x) is None else residual.to(x.dtype)
        _check_weight("residual", residual, x, (x.shape[0], weight.shape[0], x.shape[2], x.shape[3]))
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
    _check_map("x", x)
    x, weight = _autocast(x, weight)
    _check_weight("weight", weight, x, (x.shape[1], 1, None, None))
    _check_bn("bn", bn, x.shape[1], x)
    _check_choice("act", act, ACTIVATIONS)
    stride, padding = _geometry(x.shape, weight, stride, padding)
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
        raise InputValueError(f"mean must be a tensor of shape [N, C], got {_describe(mean)}")
    if mean.dtype not in (torch.float32, torch.float64):
        raise InputTypeError(f"mean must be float32 or float64, got {mean.dtype}")
    _check_se("se", se, mean, mean.shape[1], (torch.float16, torch.bfloat16))
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
    _check_map("x", x)
    (x,) = _autocast(x)
    if x.shape[2] * x.shape[3] == 0:
        raise InputValueError(f"x must have at least one pixel, got shape {tuple(x.shape)}")
    _check_se("se", se, x, x.shape[1])
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
    _check_map("x", x)
    x, weight, project_weight = _autocast(x, expand.weight, project.weight if project else None)
    _check_weight("expand.weight", weight, x, (None, x.shape[1], None, None))
    _check_bn("expand.bn", expand.bn, weight.shape[0], x)
    _check_choice("act", act, ACTIVATIONS)
    if project is not None:
        _check_weight("project.weight", project_weight, x, (None, weight.shape[0], 1, 1))
        _check_bn("project.bn", project.bn, project_weight.shape[0], x)
    stride, padding = _geometry(x.shape, weight, stride, padding)
    if residual:
        out = weight if project is None else project_weight
        _check_residual(x, out.shape[0], weight, stride, padding)
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
    _check_map("x", x)
    x, expand_weight, weight, project_weight = _autocast(
        x, expand.weight if expand else None, depthwise.weight, project.weight
    )
    mid = x.shape[1]
    if expand is not None:
        _check_weight("expand.weight", expand_weight, x, (None, x.shape[1], 1, 1))
        mid = expand_weight.shape[0]
        _check_bn("expand.bn", expand.bn, mid, x)
    _check_weight("depthwise.weight", weight, x, (mid, 1, None, None))
    _check_bn("depthwise.bn", depthwise.bn, mid, x)
    _check_weight("project.weight", project_weight, x, (None, mid, 1, 1))
    _check_bn("project.bn", project.bn, project_weight.shape[0], x)
    if se is not None:
        _check_se("se", se, x, mid)
    _check_choice("act", act, ACTIVATIONS)
    _check_choice("project_act", project_act, ACTIVATIONS)
    stride, padding = _geometry(x.shape, weight, stride, padding)
    if residual:
        _check_residual(x, project_weight.shape[0], weight, stride, padding)
    return _mbconv(
        x, expand_weight, [] if expand is None else list(expand.bn[:4]), 0.0 if expand is None else expand.bn.eps,
        weight, list(depthwise.bn[:4]), depthwise.bn.eps, stride, padding, act,
        [] if se is None else list(se[:4]), "identity" if se is None else se.act, "sigmoid" if se is None else se.gate,
        project_weight, list(project.bn[:4]), project.bn.eps, project_act, residual, backend,
    )  # fmt: skip


def _describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_map(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise InputTypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise InputValueError(f"{name} must have shape [N, C, H, W], got {_describe(x)}")
    if not x.is_floating_point():
        raise InputTypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if x.layout is not torch.strided:
        raise InputTypeError(f"{name} must be a dense tensor, got {x.layout}")


# The checks below run at every call of every block, so each first asks for all that is wanted in one
# expression, and looks for what is missing only when that fails.


def _check_weight(name: str, weight: Tensor, x: Tensor, shape: tuple[int | None, ...]) -> None:
    try:
        o, i, h, w = weight.shape
        if (
            (o == shape[0] or shape[0] is None)
            and (i == shape[1] or shape[1] is None)
            and (h == shape[2] or shape[2] is None)
            and (w == shape[3] or shape[3] is None)
            and weight.dtype is x.dtype
            and weight.device == x.device
        ):
            return
    except (AttributeError, ValueError):
        pass
    if not isinstance(weight, Tensor):
        raise InputTypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if weight.dtype != x.dtype:
        raise InputTypeError(f"{name} must have the dtype of x, {x.dtype}, got {weight.dtype}")
    if weight.device != x.device:
        raise InputValueError(f"{name} must be on the device of x, {x.device}, got {weight.device}")
    wanted = ", ".join("*" if size is None else str(size) for size in shape)
    raise InputValueError(f"{name} must have shape [{wanted}], got {_describe(weight)}")


def _check_vector(
    name: str, vector: Tensor, shape: tuple[int, ...], x: Tensor, also: tuple[torch.dtype, ...] = ()
) -> None:
    if not isinstance(vector, Tensor):
        raise InputTypeError(f"{name} must be a tensor, got {type(vector).__name__}")
    if vector.shape != shape:
        raise InputValueError(f"{name} must have shape {list(shape)}, got {_describe(vector)}")
    if vector.device != x.device:
        raise InputValueError(f"{name} must be on the device of x, {x.device}, got {vector.device}")
    dtypes = (torch.float32, x.dtype, *also)
    if vector.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
        raise InputTypeError(f"{name} must be {wanted}, got {vector.dtype}")


def _check_bn(name: str, bn: BatchNorm, channels: int, x: Tensor) -> None:
    shape, dtypes, device = (channels,), (torch.float32, x.dtype), x.device
    if type(bn) is BatchNorm:
        gamma, beta, mean, var, _ = bn
        try:
            if (
                gamma.shape == beta.shape == mean.shape == var.shape == shape
                and gamma.device == beta.device == mean.device == var.device == device
                and gamma.dtype in dtypes
                and beta.dtype in dtypes
                and mean.dtype in dtypes
                and var.dtype in dtypes
            ):
                return
        except AttributeError:
            pass
    if not isinstance(bn, BatchNorm):
        raise InputTypeError(f"{name} must be a BatchNorm, got {type(bn).__name__}")
    for field, vector in zip(BatchNorm._fields, bn[:4], strict=False):
        _check_vector(f"{name}.{field}", vector, shape, x)


def _check_se(
    name: str, se: SqueezeExciteWeights, x: Tensor, channels: int, also: tuple[torch.dtype, ...] = ()
) -> None:
    if not isinstance(se, SqueezeExciteWeights):
        raise InputTypeError(f"{name} must be SqueezeExciteWeights, got {type(se).__name__}")
    reduced = se.w_reduce.shape[0] if isinstance(se.w_reduce, Tensor) and se.w_reduce.dim() > 0 else 0
    _check_vector(f"{name}.w_reduce", se.w_reduce, (reduced, channels, 1, 1), x, also)
    _check_vector(f"{name}.b_reduce", se.b_reduce, (reduced,), x, also)
    _check_vector(f"{name}.w_expand", se.w_expand, (channels, reduced, 1, 1), x, also)
    _check_vector(f"{name}.b_expand", se.b_expand, (channels,), x, also)
    _check_choice(f"{name}.act", se.act, ACTIVATIONS)
    _check_choice(f"{name}.gate", se.gate, GATES)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_residual(x: Tensor, channels: int, weight: Tensor, stride: list[int], padding: list[int]) -> None:
    same_height = padding[0] + padding[1] == weight.shape[2] - 1
    same_width = padding[2] + padding[3] == weight.shape[3] - 1
    if channels != x.shape[1] or stride != [1, 1] or not (same_height and same_width):
        raise InputValueError(
            f"residual needs an output of x's shape {tuple(x.shape)}, got {channels} channels, "
            f"stride {stride} and padding {padding} for a {weight.shape[2]}x{weight.shape[3]} kernel"
        )


def _geometry(size: Sequence[int], weight: Tensor, stride: Pair, padding: Pair | None) -> tuple[list[int], list[int]]:
    """``stride`` as [vertical, horizontal] and ``padding`` as [top, bottom, left, right], checked."""
    kh, kw = weight.shape[2], weight.shape[3]
    stride = [stride, stride] if isinstance(stride, int) else list(stride)
    if len(stride) != 2 or any(s < 1 for s in stride):
        raise InputValueError(f"stride must be a positive int or two of them, got {stride}")
    if padding is None:
        padding = ((kh - 1) // 2, (kw - 1) // 2)
    padding = [padding] * 4 if isinstance(padding, int) else list(padding)
    if len(padding) == 2:
        padding = [padding[0], padding[0], padding[1], padding[1]]
    holds = internals.for_every_size if torch.compiler.is_compiling() else bool
    if len(padding) != 4 or any(holds(p < 0) for p in padding):
        raise InputValueError(f"padding must be one, two or four ints >= 0, got {padding}")
    top, bottom, left, right = padding
    if holds(size[2] + top + bottom < kh) or holds(size[3] + left + right < kw):
        raise InputValueError(f"the {kh}x{kw} kernel does not fit x of shape {tuple(size)} with padding {padding}")
    return stride, padding


def _autocast(x: Tensor, *weights: Tensor | None) -> tuple[Any, ...]:
    """x and the weights in autocast's dtype where autocast is on; as they came where it is off."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, *weights
    return tuple(t if t is None else converted(t, Tensor.to, dtype) for t in (x, *weights))
