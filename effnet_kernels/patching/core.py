"""patch, unpatch and report: walk the model, swap classes, undo, explain.

A block is patched by swapping its ``__class__`` for a subclass without state of its own, whose forward is
the fused call and whose ``super().forward`` is the fallback. So the model keeps its parameters, names,
``state_dict``, ``isinstance``, deepcopy and pickle. Which class becomes which is one table,
``ADAPTERS``, filled by one file per library.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import nn

from effnet_kernels import internals
from effnet_kernels.backends import check_backend
from effnet_kernels.modules import replay
from effnet_kernels.modules.fusing import BACKEND_ATTRIBUTE, Plan
from effnet_kernels.modules.reading import Unfusable, check_calls

Model = TypeVar("Model", bound=nn.Module)
Row = tuple[str, str, str]


class Part(NamedTuple):
    """What one plan covers: the whole module, or those modules in it, by name, whose calls it replaces."""

    read: Callable[[nn.Module], Plan]
    calls: Callable[[nn.Module], dict[str, nn.Module]] | None = None


class Adapter(NamedTuple):
    """How one stock class is patched."""

    stock: type[nn.Module]
    patched: type[nn.Module]
    parts: tuple[Part, ...]


# By stock and by patched class.
ADAPTERS: dict[type, Adapter] = {}
# Classes of the same libraries that no op covers, with the reason.
UNSUPPORTED: dict[type, str] = {}

# A library's adapter is imported only when the library's blocks are, so that ours needs neither.
_LIBRARIES = {
    "effnet_kernels.patching.timm": ("timm.models.efficientnet", "timm.models.mobilenetv3"),
    "effnet_kernels.patching.torchvision": ("torchvision.models.efficientnet",),
}


def register(stock: type[nn.Module], patched: type[nn.Module], *parts: Part) -> None:
    """Enter one row into ``ADAPTERS``."""
    ADAPTERS[stock] = ADAPTERS[patched] = Adapter(stock, patched, parts)
    for part in parts:
        if part.calls is None:
            replay.BLOCKS[patched] = part.read


@dataclass
class PatchReport:
    """What of a model is fused. Rows are (name, type, detail or reason); ``str()`` is a table."""

    patched: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("fused", *row) for row in self.patched] + [("stock", *row) for row in self.skipped]
        lines = [("", "module", "type", "what, or why not"), *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        table = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in lines
        ]
        return "\n".join([*table, f"{len(self.patched)} fused, {len(self.skipped)} stock"])


def patch(model: Model, *, backend: str = "auto") -> Model:
    """Make the blocks, stem and head of a timm or torchvision model run as fused kernels.

    Works in place and may be called again, for instance with another backend. Parameters, buffers, names, the
    ``state_dict`` and ``isinstance`` stay as they are. What cannot be fused runs its stock forward;
    ``report`` lists it with the reason. Results are in channels-last memory.

    Args:
        model: any module with blocks of timm or torchvision inside.
        backend: backend of every fused call in this model; "auto" leaves it to ``use_backend``, the
            environment and the measured order.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no block of a known class in it, or no backend of that name.
        RuntimeError: the backend cannot run here.
        The model stays as it was whenever an exception leaves this function.
    """
    check_backend(backend)
    before: list[tuple[nn.Module, type[nn.Module], str | None]] = []
    try:
        for _, module in _known(model):
            adapter = ADAPTERS.get(type(module))
            if adapter is not None:
                before.append((module, type(module), module.__dict__.get(BACKEND_ATTRIBUTE)))
                _set(module, adapter.patched, None if backend == "auto" else backend)
    except BaseException:
        for module, stock, previous in before:
            _set(module, stock, previous)
        raise
    return model


def unpatch(model: Model) -> Model:
    """The exact inverse of ``patch``: every module gets its own class back. Returns the same model.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_module(model)
    for module in model.modules():
        adapter = ADAPTERS.get(type(module))
        if adapter is not None:
            _set(module, adapter.stock, None)
    return model


def report(model: nn.Module) -> PatchReport:
    """What of ``model`` is fused, and why the rest is not, at this moment.

    In training mode a block is fused where its backend trains (docs/training.md). Blocks inside a fused block
    are not listed.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no block of a known class in it.
    """
    result = PatchReport()
    covered: set[nn.Module] = set()  # modules whose calls a fused part replaces
    for name, module in _known(model):
        if module in covered:
            continue
        adapter = ADAPTERS.get(type(module))
        if adapter is None:
            result.skipped.append((name, type(module).__name__, UNSUPPORTED[type(module)]))
            continue
        for part in adapter.parts:
            calls = dict(module.named_children()) if part.calls is None else part.calls(module)
            row_name = name
            if part.calls is not None:
                row_name = " + ".join(f"{name}.{child}".lstrip(".") for child in calls)
            fused, what = _explain(module, part, calls)
            row = (row_name, adapter.stock.__name__, what)
            (result.patched if fused else result.skipped).append(row)
            if fused:
                covered.update(inner for call in calls.values() for inner in call.modules())
    return result


def _explain(module: nn.Module, part: Part, calls: dict[str, nn.Module]) -> tuple[bool, str]:
    """Whether the part is fused, and as what, or why not."""
    if internals.refusal:
        return False, internals.refusal
    try:
        check_calls(calls.values(), [])
        plan = part.read(module)
    except Unfusable as reason:
        return False, str(reason)
    if type(module) is ADAPTERS[type(module)].stock:
        return False, f"not patched: {plan}"
    backend = module.__dict__.get(BACKEND_ATTRIBUTE)
    return True, str(plan) if backend is None else f"{plan} [{backend}]"


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a known class; raises before the first if the model is no module or has none."""
    _check_module(model)
    for adapter, needed in _LIBRARIES.items():
        if all(module in sys.modules for module in needed):
            importlib.import_module(adapter)
    known = [(name, m) for name, m in model.named_modules() if type(m) in ADAPTERS or type(m) in UNSUPPORTED]
    if not known:
        raise ValueError(
            f"model must have blocks of timm or torchvision to patch, found none in {type(model).__name__}"
        )
    yield from known


def _set(module: nn.Module, cls: type[nn.Module], backend: str | None) -> None:
    module.__class__ = cls
    if backend is None:
        module.__dict__.pop(BACKEND_ATTRIBUTE, None)
    else:
        module.__dict__[BACKEND_ATTRIBUTE] = backend


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
