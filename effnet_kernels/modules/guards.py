"""Whether a fused call would go unnoticed: nobody watches, traces or replaces what it leaves out."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_kernels import internals
from effnet_kernels.internals import CALL, CHECK_INPUT, COMPILED, CONV_FORWARD
from effnet_kernels.modules.reading import Unfusable

# What a call of a module goes through, as far as its class has it; of whole models, what leads to their blocks.
_METHODS = (
    "forward", CONV_FORWARD, CHECK_INPUT, "forward_features", "forward_intermediates", "_forward_impl", "_collect",
)  # fmt: skip
# By patched class, the stock one whose forward it replaces.
STANDS_FOR: dict[type, type] = {}
# By class, the methods of the stock class that it stands for, as (class, name, method).
_written: dict[type, list[tuple[type, str, Any]]] = {}
# What calls of stock layers come down to; profilers, for one, replace such functions.
_FUNCTIONS = [
    (owner, name, getattr(owner, name))
    for owner, names in (
        (F, ("conv2d", "batch_norm", "pad", "silu", "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid")),
        (torch, ("batch_norm", "sigmoid")),
        (Tensor, ("mean", "sigmoid")),
        (nn.Module, ("__call__", CALL)),
    )
    for name in names
    if hasattr(owner, name)
]


def may_fuse(x: Tensor) -> bool:
    """Whether nobody watches, traces or transforms this call in a way that the ops would not take part in."""
    if torch.compiler.is_compiling():
        return isinstance(x, Tensor) and internals.traceable() and not torch.onnx.is_in_onnx_export()
    return type(x) is Tensor and not x.is_nested and not internals.watched() and _are(_FUNCTIONS)


def is_plain(x: Tensor) -> bool:
    """Whether this is inference with nobody between us and the kernels."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and not internals.dispatch_modes()


def check_calls(modules: Iterable[nn.Module | None]) -> None:
    """Raise Unfusable if leaving out the calls of these modules and their children could be noticed."""
    _check_calls(modules, set())


def _check_calls(modules: Iterable[nn.Module | None], classes: set[type]) -> None:
    """``classes``: those that were found to be as written."""
    for module in modules:
        if module is None:
            continue
        cls = type(module)
        if is_observed(module):
            scripted = isinstance(module, torch.jit.ScriptModule)
            raise Unfusable(
                f"{cls.__name__} {'is a ScriptModule' if scripted else 'has hooks or a forward of its own'}"
            )
        if cls not in classes:
            check_class(cls)
            classes.add(cls)
        children = module.__dict__["_modules"]
        if children:
            _check_calls(children.values(), classes)


def is_observed(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: hooks, a method put on the instance, ``compile``."""
    d = module.__dict__
    try:
        return bool(
            d["_forward_hooks"]
            or d["_forward_pre_hooks"]
            or d["_backward_hooks"]
            or d["_backward_pre_hooks"]
            or "forward" in d
            or CONV_FORWARD in d
            or CHECK_INPUT in d
            or CALL in d
            or (d.get(COMPILED) is not None and not torch.compiler.is_compiling())
        )
    except KeyError:  # not Python's modules: compiled by TorchScript
        return True


def check_class(cls: type) -> None:
    """Raise Unfusable if somebody has replaced the forward of a class."""
    if not as_written(cls):
        raise Unfusable(f"the forward of {cls.__name__} has been replaced")


def as_written(cls: type) -> bool:
    """Whether the methods of a class, or of the stock class that it stands for, are those of its library."""
    if cls not in _written:
        stock = next((STANDS_FOR[c] for c in cls.__mro__ if c in STANDS_FOR), cls)
        methods = [(stock, name, _method(stock, name)) for name in _METHODS if hasattr(stock, name)]
        if any(method is None for _, _, method in methods):
            return False
        _written[cls] = methods
    return cls.__call__ is nn.Module.__call__ and _are(_written[cls])


def _method(cls: type, name: str) -> Any:
    """A method of a class; None unless it comes from the file that has the class, or the base that it is from."""
    owner = next(c for c in cls.__mro__ if name in c.__dict__)
    method = owner.__dict__[name]
    home = sys.modules.get(owner.__module__)
    return method if getattr(method, "__globals__", None) is getattr(home, "__dict__", 0) else None


def _are(functions: list[tuple[Any, str, Any]]) -> bool:
    """Whether all names of these owners stand for these functions."""
    for owner, name, function in functions:  # noqa: SIM110 (a generator takes twice as long)
        if getattr(owner, name) is not function:
            return False
    return True
