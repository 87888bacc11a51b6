"""What can be done to the modules of a model: hooks, forwards, settings, modes."""

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.modules.module as module_globals
from torch import Tensor, nn

from tests.patching.property.models import _blocks, blocks

_log: list[Any] = []


def note(what: str, factor: float, *_: Any) -> Any:
    """A hook; with a factor it changes what it gets last."""
    _log.append(what)
    last = _[-1]
    if factor == 1:
        return None
    if isinstance(last, tuple):
        return tuple(factor * t if isinstance(t, Tensor) else t for t in last)
    return factor * last if isinstance(last, Tensor) else None


def note_class(module: nn.Module, *_: Any) -> None:
    if not isinstance(module, nn.Identity):  # of which timm's BatchNorm has one more than ours
        _log.append(type(module).__name__)


def doubled(self: nn.Module, x: Tensor) -> Any:
    _log.append("doubled")
    y = type(self).forward(self, x)
    return 2 * y if isinstance(y, Tensor) else y


def doubled_conv(self: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return 2 * nn.Conv2d._conv_forward(self, x, weight, bias)  # type: ignore[arg-type]


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


CHANGED: dict[type, Callable[[Any], Any]] = {
    bool: lambda value: not value,
    int: lambda value: value + 1,
    float: lambda value: value / 2 + 0.25,
    tuple: lambda value: tuple(v + 1 if isinstance(v, int) else v for v in value),
}
# Flags of torch's own, and what nobody's forward reads.
NO_MATTER = ("_is_full_backward_hook", "_is_hf_initialized")


class On(NamedTuple):
    """What an action knows."""

    model: nn.Module
    path: str
    how: int
    role: str
    dtype: torch.dtype
    stack: contextlib.ExitStack

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.path)

    def one_of(self, *ways: Any) -> Any:
        return ways[self.how % len(ways)]

    def replace(self, module: nn.Module) -> None:
        parent, _, name = self.path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)


Action = Callable[[On], nn.Module | None]
ACTIONS: dict[str, tuple[type | tuple[type, ...], Action]] = {}


def action(*kinds: type) -> Callable[[Action], Action]:
    """Enter an action that can be done to modules of these classes; without any, to the model."""

    def enter(function: Action) -> Action:
        ACTIONS[function.__name__.replace("_", " ")] = (kinds, function)
        return function

    return enter


@action(nn.Module)
def forward_hook(on: On) -> None:
    on.module.register_forward_hook(functools.partial(note, f"forward {on.path}", on.one_of(1, 1.5)))


@action(nn.Module)
def forward_pre_hook(on: On) -> None:
    on.module.register_forward_pre_hook(functools.partial(note, f"pre {on.path}", on.one_of(1, 1.5)))


@action(nn.Module)
def hook_with_keywords(on: On) -> None:
    on.module.register_forward_hook(lambda m, a, k, y: note("keywords", 1, y), with_kwargs=True, always_call=True)


@action(nn.Module)
def backward_hook(on: On) -> None:
    on.module.register_full_backward_hook(lambda m, i, o: note(f"backward {on.path}", on.one_of(1, 1.5), i))


@action(nn.Module)
def backward_pre_hook(on: On) -> None:
    on.module.register_full_backward_pre_hook(functools.partial(note, f"backward pre {on.path}", on.one_of(1, 1.5)))


@action(nn.Module)
def hook_that_goes(on: On) -> None:
    on.module.register_forward_hook(functools.partial(note, "gone", 2)).remove()


@action()
def global_hook(on: On) -> None:
    if on.role == "stock":  # there is one for all
        register = on.one_of(
            module_globals.register_module_forward_hook,
            module_globals.register_module_forward_pre_hook,
            module_globals.register_module_full_backward_hook,
        )
        on.stack.callback(register(note_class).remove)


@action(nn.Module)
def forward_of_instance(on: On) -> None:
    on.module.forward = types.MethodType(doubled, on.module)  # type: ignore[method-assign]


@action(nn.Conv2d)
def conv_forward_of_instance(on: On) -> None:
    on.module._conv_forward = types.MethodType(doubled_conv, on.module)  # type: ignore[method-assign]


@action(nn.Conv2d, nn.BatchNorm2d, nn.SiLU, nn.ReLU, nn.Sigmoid, blocks.SqueezeExcite, blocks.InvertedResidual)
def forward_of_class(on: On) -> None:
    if on.role != "stock":  # done
        return
    cls = next(c for c in type(on.module).__mro__ if "forward" in c.__dict__)
    forward = cls.forward
    on.stack.callback(setattr, cls, "forward", forward)
    cls.forward = lambda self, *a, **k: 1.25 * forward(self, *a, **k)


@action(nn.Conv2d)
def class_of_ones_own(on: On) -> None:
    if type(on.module) is nn.Conv2d:
        on.module.__class__ = Doubled


@action(nn.Conv2d)
def stride(on: On) -> None:
    on.module.stride = on.one_of((1, 1), (2, 2), [1, 1], 1, (2, 1), torch.Size([2, 2]), torch.Size([1, 1]))


@action(nn.Conv2d, nn.BatchNorm2d)
def setting_changed_in_place(on: On) -> None:
    if isinstance(getattr(on.module, "stride", None), list):
        on.module.stride[:] = on.one_of([2, 2], [1, 1])
    if isinstance(getattr(on.module, "eps", None), Tensor):
        on.module.eps.fill_(0.01)


@action(nn.Module)
def any_setting(on: On) -> None:
    """Whatever a module has, its forward may read."""
    found = sorted(name for name, value in vars(on.module).items() if type(value) in CHANGED and name not in NO_MATTER)
    if found:
        name = found[on.how % len(found)]
        value = vars(on.module)[name]
        setattr(on.module, name, CHANGED[type(value)](value))


@action(nn.Conv2d)
def padding_mode(on: On) -> None:
    p = on.one_of(0, 1)
    on.module.padding_mode, on.module._reversed_padding_repeated_twice = on.one_of("reflect", "circular"), [p] * 4


@action(nn.Conv2d)
def padding(on: On) -> None:
    on.module.padding = on.one_of((1, 1), (2, 2), [1, 1], (0, 1), "same", (0, 0))


@action(nn.Conv2d)
def dilation(on: On) -> None:
    on.module.dilation = on.one_of((2, 2), (1, 1))


@action(nn.BatchNorm2d)
def eps(on: On) -> None:
    on.module.eps = on.one_of(0.1, 1e-5, 1, np.float64(0.2), np.float64(0.02), torch.tensor(0.3))


@action(nn.BatchNorm2d)
def momentum(on: On) -> None:
    on.module.momentum = on.one_of(None, 0.0, 0.5, 1.0, 1)


@action(nn.BatchNorm2d)
def no_tracking(on: On) -> None:
    on.module.track_running_stats = False


@action(nn.BatchNorm2d)
def buffers_that_are_gone(on: On) -> None:
    for name in on.one_of(["num_batches_tracked"], ["running_mean", "running_var"]):
        setattr(on.module, name, None)


@action(nn.BatchNorm2d)
def buffers_that_want_gradients(on: On) -> None:
    on.one_of(on.module.running_mean, on.module.running_var).requires_grad_()


@action(nn.BatchNorm2d)
def parameters_that_are_gone(on: On) -> None:
    for name in on.one_of(["weight"], ["bias"], ["weight", "bias"]):
        setattr(on.module, name, None)


@action(nn.Conv2d)
def bias(on: On) -> None:
    weight = on.module.weight
    on.module.bias = nn.Parameter(torch.full((weight.shape[0],), 0.25, dtype=weight.dtype))


@action(nn.Module)
def another_child(on: On) -> None:
    on.replace(on.one_of(nn.Identity, nn.GELU, nn.Sigmoid, nn.ReLU6, Halved, lambda: nn.AdaptiveMaxPool2d(1))())


@action(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)
def in_place_or_not(on: On) -> None:
    on.module.inplace = on.one_of(False, True)


@action(*{type(m) for m in _blocks(blocks).modules() if hasattr(m, "drop_prob")})
def stochastic_depth(on: On) -> None:
    on.module.drop_prob = on.one_of(0.5, 0.0)


@action(nn.Module)
def module_in_another_mode(on: On) -> None:
    on.module.train(on.one_of(False, True))


@action(nn.Module)
def frozen(on: On) -> None:
    on.module.requires_grad_(False)


@action(nn.Module)
def trained_alone(on: On) -> None:
    on.model.requires_grad_(False)
    on.module.requires_grad_()
