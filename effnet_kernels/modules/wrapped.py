"""Modules whose class torch has wrapped in another one at run time, to shard, replicate or parametrize them."""

import sys

import torch
from torch import nn
from torch.nn.utils import parametrize

from effnet_kernels.internals import GATHERED, REPLICATE, REPLICATE_BY_DDP

# Classes that torch puts in front of a module's own, as in FSDPConv2d(FSDPModule, Conv2d). Their work is done by
# hooks; forward is that of the module's own class.
_MIXINS = {
    "torch.distributed.fsdp": "FSDPModule",
    REPLICATE: "ReplicateModule",
    REPLICATE_BY_DDP: "DDP",
}
# By wrapping class and what is to be wrapped instead.
_exchanged: dict[tuple[type, type], type] = {}


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without those that torch has wrapped around it to shard, replicate or parametrize it.

    While torch.compile traces, what is wrapped stays so: it could not follow the search.
    """
    return type(module) if torch.compiler.is_compiling() else _own(type(module))


def exchange(wrapping: type, cls: type) -> type:
    """``cls``, with the wrappers of ``wrapping`` around it if there are any."""
    inner = _inner(wrapping)
    if inner is None:
        return cls
    bases = (*wrapping.__bases__[:-1], exchange(inner, cls))
    if bases == wrapping.__bases__:
        return wrapping
    made = _exchanged.get((wrapping, cls))
    if made is None:
        namespace = {name: value for name, value in vars(wrapping).items() if name not in ("__dict__", "__weakref__")}
        made = type(wrapping.__name__, bases, namespace)
        if len(bases) > 1:  # a parametrized class is one module's alone, and changes: it is made anew
            _exchanged[wrapping, cls], _exchanged[made, _own(inner)] = made, wrapping
    return made


def _own(cls: type) -> type:
    while (inner := _inner(cls)) is not None:
        cls = inner
    return cls


def _inner(cls: type) -> type | None:
    """The class that ``cls`` is wrapped around; None if it is no wrapper of torch's."""
    *mixins, inner = cls.__bases__ or (object,)
    if cls.__module__ == parametrize.__name__ and cls.__name__.startswith("Parametrized"):
        return inner
    if len(mixins) == 1 and cls.__module__.startswith("torch.") and mixins[0] in _mixins():
        return inner
    return None


def _mixins() -> list[type]:
    # Where none of them is imported, no module can have one.
    found = (getattr(sys.modules.get(module), name, None) for module, name in _MIXINS.items())
    return [mixin for mixin in found if mixin is not None]


def gathered(model: nn.Module) -> set[nn.Module]:
    """The modules whose weights are there during a call only: FSDP gathers them before it."""
    found = {module for module in model.modules() if GATHERED in module.__dict__}
    for module in model.modules():
        if module not in found and any(mixin in type(module).__mro__ for mixin in _mixins()):
            found.update(module.modules())
    return found


def as_gathered(module: nn.Module) -> nn.Module:
    """A likeness of the module to read as a plan: its weights are of the shape that a call will find, without data."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {
        name: p if p is None else nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), False)
        for name, p in module._parameters.items()
    }
    twin.__dict__["_modules"] = {
        name: child if child is None else as_gathered(child) for name, child in module._modules.items()
    }
    return twin
