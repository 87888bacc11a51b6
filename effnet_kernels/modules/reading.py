"""Reading modules: from the children of a block to the arguments of the ops, or the reason why not.

A block is read anew at every call, so a stride, an epsilon, an activation or a weight changed in place is
seen at once, and nothing is kept that could go stale. That makes this code hot. It reads ``module.__dict__``,
several times faster than ``nn.Module.__getattr__``, and tells modules apart by their exact type, which also
turns away parametrized modules and subclasses with a forward of their own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effnet_kernels.functional import BatchNorm, SqueezeExciteWeights
from effnet_kernels.modules import layers
from effnet_kernels.modules.wrapped import own_class

# Libraries add their own classes to these tables, see effnet_kernels/patching/.
CONVOLUTIONS: dict[type, bool] = {nn.Conv2d: False, layers.Conv2dSame: True}  # True: padded as SAME
BATCH_NORMS: dict[type, bool] = {nn.BatchNorm2d: False, layers.BatchNormAct2d: True}  # True: has a child `act`
ACTIVATIONS: dict[type, str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
GATES: dict[type, str] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}
SQUEEZE_EXCITES: dict[type, tuple[str, ...]] = {}  # names of its reduce, act, expand, gate and, if any, pool
DROP_PATHS: dict[type, str] = {layers.DropPath: "drop_prob"}  # attribute with the probability
# Settings that forward reads and no op has, with the values that the ops stand for.
_FIXED: dict[type, dict[str, tuple[Any, ...]]] = {
    nn.ReLU6: {"min_val": (0.0,), "max_val": (6.0,)},
    nn.AdaptiveAvgPool2d: {"output_size": (1, (1, 1))},
}


# Kernel, stride and padding of a convolution; padding is None where the input's size decides (SAME).
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, ...] | None]


class Unfusable(Exception):  # noqa: N818 (a reason, not an error)
    """Why these modules cannot be run by an op."""


def pair(value: Any, what: str) -> tuple[int, int]:
    """A setting of a convolution as (vertical, horizontal): torch takes one int, or a sequence of one or two, too."""
    if type(value) is tuple and len(value) == 2:
        return value
    values = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(values) not in (1, 2) or not all(type(v) is int for v in values):
        raise Unfusable(f"a convolution has {what} {value!r}")
    return values[0], values[-1]


def pointwise(conv: nn.Module) -> Tensor:
    """The weight of a plain 1x1 convolution."""
    weight = _weight(conv)
    _check_1x1(conv, weight)
    return weight


def _check_1x1(conv: nn.Module, weight: Tensor) -> None:
    if weight.shape[2:] != (1, 1):
        raise Unfusable(f"a pointwise convolution has a {tuple(weight.shape[2:])} kernel")
    d = conv.__dict__
    if d["groups"] != 1 or pair(d["stride"], "stride") != (1, 1):
        raise Unfusable("a pointwise convolution is strided or grouped")
    if not CONVOLUTIONS[type(conv)] and (pair(d["padding"], "padding") != (0, 0) or d["padding_mode"] != "zeros"):
        raise Unfusable("a pointwise convolution is padded")


def is_pointwise(conv: nn.Module) -> bool:
    """Whether the convolution is one that ``pointwise`` reads."""
    try:
        pointwise(conv)
    except Unfusable:
        return False
    return True


def is_depthwise(conv: nn.Module) -> bool:
    """Whether every channel of the convolution is a group of its own."""
    weight = _weight(conv)
    return weight.shape[0] == conv.__dict__["groups"] > 1 == weight.shape[1]


def spatial(conv: nn.Module, *, depthwise: bool) -> tuple[Tensor, Geometry]:
    """Weight and geometry of a dense or depthwise convolution."""
    weight, d = _weight(conv), conv.__dict__
    groups = d["groups"]
    if depthwise:
        if weight.shape[1] != 1 or groups != weight.shape[0]:
            raise Unfusable(f"a convolution has {groups} groups: not depthwise")
    elif groups != 1:
        raise Unfusable(f"a convolution has {groups} groups: not dense")
    if pair(d["dilation"], "dilation") != (1, 1):
        raise Unfusable("a convolution is dilated")
    padding = None
    if not CONVOLUTIONS[type(conv)]:
        if d["padding_mode"] != "zeros":
            raise Unfusable(f"a convolution pads with {d['padding_mode']}")
        padding = pair(d["padding"], "padding")
    _, _, kh, kw = weight.shape
    return weight, ((kh, kw), pair(d["stride"], "stride"), padding)


def batch_norm(bn: nn.Module, act: nn.Module | None = None) -> tuple[BatchNorm, str]:
    """Inference-mode BatchNorm and the activation behind it: its own child, or the module ``act``."""
    has_act = BATCH_NORMS.get(type(bn))
    if has_act is None:
        raise Unfusable(f"{_name(bn)} is not BatchNorm2d")
    d = bn.__dict__
    if has_act:
        if act is not None:
            raise Unfusable("two activations in a row")
        children = d["_modules"]
        drop = children.get("drop")
        if drop is not None and type(drop) is not nn.Identity:
            raise Unfusable(f"BatchNorm drops ({_name(drop)})")
        act = children["act"]
    name = "identity" if act is None else ACTIVATIONS.get(type(act))
    if name is None:
        raise Unfusable(f"there is no op for activation {_name(act)}")
    _check_fixed(act)
    parameters, buffers = d["_parameters"], d["_buffers"]
    gamma, beta = parameters.get("weight"), parameters.get("bias")
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if gamma is None or beta is None:
        raise Unfusable("BatchNorm has no weight or bias")
    if mean is None or var is None:
        raise Unfusable("BatchNorm has no running statistics")
    if mean.requires_grad or var.requires_grad:
        raise Unfusable("running statistics of a BatchNorm want gradients")
    _check_plain(gamma, beta, mean, var)
    return BatchNorm(gamma, beta, mean, var, d["eps"]), name


def squeeze_excite(se: nn.Module) -> SqueezeExciteWeights | None:
    """Weights, activation and gate of squeeze-and-excitation; None where there is none."""
    if type(se) is nn.Identity:
        return None
    names = SQUEEZE_EXCITES.get(type(se)) or SQUEEZE_EXCITES.get(own_class(se))
    if names is None:
        raise Unfusable(f"there is no op for {_name(se)}")
    children = se.__dict__["_modules"]
    reduce, act, expand, gate, *pools = names
    for pool in pools:
        check_mean(children[pool])
    act_name = ACTIVATIONS.get(type(children[act]))
    if act_name is None:
        raise Unfusable(f"there is no op for {_name(children[act])} in squeeze-and-excitation")
    gate_name = GATES.get(type(children[gate]))
    if gate_name is None:
        raise Unfusable(f"there is no op for gate {_name(children[gate])}")
    _check_fixed(children[act])
    w_reduce, b_reduce = _fully_connected(children[reduce])
    w_expand, b_expand = _fully_connected(children[expand])
    return SqueezeExciteWeights(w_reduce, b_reduce, w_expand, b_expand, act_name, gate_name)


def check_mean(pool: nn.Module) -> None:
    """Raise Unfusable unless a pool is torchvision's way to the mean over H and W."""
    if type(pool) is not nn.AdaptiveAvgPool2d:
        raise Unfusable(f"there is no op for {_name(pool)} as a global pool")
    _check_fixed(pool)


def padding_for(geometry: Geometry, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Padding for an input of this shape: (vertical, horizontal), or (top, bottom, left, right) for SAME."""
    kernel, stride, padding = geometry
    if padding is None and len(shape) == 4:
        top, bottom = layers.same_padding(shape[2], kernel[0], stride[0])
        left, right = layers.same_padding(shape[3], kernel[1], stride[1])
        return top, bottom, left, right
    return padding


def drop_path(module: nn.Module | None) -> nn.Module | None:
    """The module that must run between the block and its shortcut; None where it does nothing."""
    if module is None or type(module) is nn.Identity:
        return None
    probability = DROP_PATHS.get(type(module))
    d = module.__dict__
    if probability is not None and (not d["training"] or d[probability] == 0.0):
        return None
    return module


def no_op(module: nn.Module | None, what: str) -> None:
    """Raise Unfusable unless the module is absent or Identity."""
    if module is not None and type(module) is not nn.Identity:
        raise Unfusable(f"{what} ({_name(module)})")


def _check_fixed(module: nn.Module | None) -> None:
    for name, values in _FIXED.get(type(module), {}).items():
        if module.__dict__[name] not in values:
            raise Unfusable(f"{_name(module)} has {name} {module.__dict__[name]!r}")


_PLAIN_TENSORS = (nn.Parameter, Tensor)


def _name(module: object) -> str:
    return type(module).__name__


def _weight(conv: nn.Module) -> Tensor:
    """The weight of a plain convolution without bias: [O, I, KH, KW]."""
    if type(conv) not in CONVOLUTIONS:
        raise Unfusable(f"{_name(conv)} is not a plain convolution")
    parameters = conv.__dict__["_parameters"]
    if parameters.get("bias") is not None:
        raise Unfusable("a convolution has a bias")
    weight = parameters.get("weight")
    if weight is None:
        raise Unfusable("the weight of a convolution is not a parameter")
    _check_plain(weight)
    if weight.dim() != 4:
        raise Unfusable(f"the weight of a convolution has {weight.dim()} dimensions")
    return weight


def _check_plain(*tensors: Tensor) -> None:
    for t in tensors:
        if type(t) not in _PLAIN_TENSORS and not torch.compiler.is_compiling():
            raise Unfusable(f"a parameter or buffer is a {type(t).__name__}")


def _fully_connected(conv: nn.Module) -> tuple[Tensor, Tensor]:
    if type(conv) is not nn.Conv2d:
        raise Unfusable(f"{_name(conv)} in squeeze-and-excitation is not a plain convolution")
    parameters = conv.__dict__["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or bias is None:
        raise Unfusable("a convolution in squeeze-and-excitation has no weight or bias")
    _check_plain(weight, bias)
    _check_1x1(conv, weight)
    return weight, bias
