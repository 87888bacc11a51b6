"""The arguments of the ops: the types that have several tensors in them, and the checks before anything runs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels import internals
from effnet_kernels.ops.activations import ACTIVATIONS, GATES
from effnet_kernels.ops.common import autocast_dtype
from effnet_kernels.ops.recording import converted

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


def describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_map(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise InputTypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise InputValueError(f"{name} must have shape [N, C, H, W], got {describe(x)}")
    if not x.is_floating_point():
        raise InputTypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if x.layout is not torch.strided:
        raise InputTypeError(f"{name} must be a dense tensor, got {x.layout}")


# The checks below run at every call of every block, so each first asks for all that is wanted in one
# expression, and looks for what is missing only when that fails.


def check_weight(name: str, weight: Tensor, x: Tensor, shape: tuple[int | None, ...]) -> None:
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
    raise InputValueError(f"{name} must have shape [{wanted}], got {describe(weight)}")


def check_vector(
    name: str, vector: Tensor, shape: tuple[int, ...], x: Tensor, also: tuple[torch.dtype, ...] = ()
) -> None:
    if not isinstance(vector, Tensor):
        raise InputTypeError(f"{name} must be a tensor, got {type(vector).__name__}")
    if vector.shape != shape:
        raise InputValueError(f"{name} must have shape {list(shape)}, got {describe(vector)}")
    if vector.device != x.device:
        raise InputValueError(f"{name} must be on the device of x, {x.device}, got {vector.device}")
    dtypes = (torch.float32, x.dtype, *also)
    if vector.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
        raise InputTypeError(f"{name} must be {wanted}, got {vector.dtype}")


def check_bn(name: str, bn: BatchNorm, channels: int, x: Tensor) -> None:
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
        check_vector(f"{name}.{field}", vector, shape, x)


def check_se(name: str, se: SqueezeExciteWeights, x: Tensor, channels: int, also: tuple[torch.dtype, ...] = ()) -> None:
    if not isinstance(se, SqueezeExciteWeights):
        raise InputTypeError(f"{name} must be SqueezeExciteWeights, got {type(se).__name__}")
    reduced = se.w_reduce.shape[0] if isinstance(se.w_reduce, Tensor) and se.w_reduce.dim() > 0 else 0
    check_vector(f"{name}.w_reduce", se.w_reduce, (reduced, channels, 1, 1), x, also)
    check_vector(f"{name}.b_reduce", se.b_reduce, (reduced,), x, also)
    check_vector(f"{name}.w_expand", se.w_expand, (channels, reduced, 1, 1), x, also)
    check_vector(f"{name}.b_expand", se.b_expand, (channels,), x, also)
    check_choice(f"{name}.act", se.act, ACTIVATIONS)
    check_choice(f"{name}.gate", se.gate, GATES)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputValueError(f"{name} must be one of {choices}, got {value!r}")


def check_residual(x: Tensor, channels: int, weight: Tensor, stride: list[int], padding: list[int]) -> None:
    same_height = padding[0] + padding[1] == weight.shape[2] - 1
    same_width = padding[2] + padding[3] == weight.shape[3] - 1
    if channels != x.shape[1] or stride != [1, 1] or not (same_height and same_width):
        raise InputValueError(
            f"residual needs an output of x's shape {tuple(x.shape)}, got {channels} channels, "
            f"stride {stride} and padding {padding} for a {weight.shape[2]}x{weight.shape[3]} kernel"
        )


def window(size: Sequence[int], weight: Tensor, stride: Pair, padding: Pair | None) -> tuple[list[int], list[int]]:
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


def autocast(x: Tensor, *weights: Tensor | None) -> tuple[Any, ...]:
    """x and the weights in autocast's dtype where autocast is on; as they came where it is off."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, *weights
    return tuple(t if t is None else converted(t, Tensor.to, dtype) for t in (x, *weights))
