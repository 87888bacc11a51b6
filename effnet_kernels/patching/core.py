"""patch, unpatch and report: walk the model, swap classes, undo, explain.

A block is patched by swapping its ``__class__`` for a subclass without state of its own, whose forward is
the fused call and whose ``super().forward`` is the fallback. So the model keeps its parameters, names,
``state_dict``, ``isinstance``, deepcopy and pickle. Which class becomes which is one table,
``ADAPTERS``, filled by one file per library; what the new classes share is in ``classes.py``.
"""

import copyreg
import functools
import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsIndex, TypeVar

from torch import nn

from effnet_kernels import internals
from effnet_kernels.dispatch import check_backend
from effnet_kernels.modules import program
from effnet_kernels.modules.fusing import Part, plan_of
from effnet_kernels.modules.guards import STANDS_FOR
from effnet_kernels.modules.program import BACKEND_ATTRIBUTE, FROZEN_ATTRIBUTE, Frozen
from effnet_kernels.modules.reading import Unfusable
from effnet_kernels.modules.wrapped import as_gathered, exchange, gathered, own_class
from effnet_kernels.patching.classes import PatchedType, rename

Model = TypeVar("Model", bound=nn.Module)
Row = tuple[str, str, str]


class Adapter(NamedTuple):
    """How one stock class is patched."""

    stock: type[nn.Module]
    patched: type[nn.Module]
    parts: tuple[Part, ...]
    meant: Callable[[nn.Module], bool]  # of a class for models of all kinds: whether this one is of ours


# By stock and by patched class.
ADAPTERS: dict[type, Adapter] = {}
# Classes of the same libraries that no op covers, with the reason.
UNSUPPORTED: dict[type, str] = {}

# A library's adapter is imported only when the library's blocks are, so that ours needs neither.
_LIBRARIES = {
    "effnet_kernels.patching.timm": ("timm.models.efficientnet", "timm.models.mobilenetv3"),
    "effnet_kernels.patching.torchvision": ("torchvision.models.efficientnet",),
}


class StandIn:
    """A model with other things in place of some of its children, for its library's own forward to run on.

    Of a ModuleDict it has the length and the items, too.
    """

    def __init__(self, model: nn.Module, children: dict[str, Any]) -> None:
        self._model, self._children = model, children

    def __getattr__(self, name: str) -> Any:
        return self._children[name] if name in self._children else getattr(self._model, name)

    def __len__(self) -> int:
        return len(self._model._modules)

    def items(self) -> Iterable[tuple[str, Any]]:
        return [(name, self._children.get(name, child)) for name, child in self._model._modules.items()]


def register(
    stock: type[nn.Module],
    patched: type[nn.Module],
    *parts: Part,
    meant: Callable[[nn.Module], bool] = lambda module: True,
) -> None:
    """Enter one row into ``ADAPTERS``; the patched class gets the names of the stock one, also in pickles."""
    ADAPTERS[stock] = ADAPTERS[patched] = Adapter(stock, patched, parts, meant)
    STANDS_FOR[patched] = stock
    rename(stock, patched)
    patched.__reduce_ex__ = _reduce  # type: ignore[method-assign]
    for name in ("train", "load_state_dict", internals.APPLY, internals.LOAD):
        setattr(patched, name, _watched(patched, name))
    if any(part.calls is None for part in parts):
        program.REPLACEABLE.add(patched)


def _watched(patched: type[nn.Module], name: str) -> Callable[..., Any]:
    """A method of a patched class in place of the one that it inherits, which ends what is kept of the module."""

    @functools.wraps(getattr(nn.Module, name))
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = self.training
        if name != "train":
            program.forget(self)
        result = getattr(super(patched, self), name)(*args, **kwargs)
        if name != "train" or self.training != before:
            program.forget(self)  # what others have kept meanwhile, too
        if self.training and not before:
            program.thaw(self)
        return result

    return method


def patched_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The class that ``patch`` gives to a module of class ``stock``: what a pickled one is loaded as."""
    load_adapters()
    return ADAPTERS[stock].patched if stock in ADAPTERS else stock


def patched_instance(stock: type[nn.Module]) -> nn.Module:
    """A module of ``patched_class(stock)`` without any state, as pickles are loaded."""
    cls = patched_class(stock)
    return cls.__new__(cls)


def _reduce(module: object, protocol: SupportsIndex) -> tuple[Any, ...] | str:
    """``__reduce_ex__`` of patched modules, without their class: cloudpickle would take that apart."""
    reduced = object.__reduce_ex__(module, max(int(protocol), 2))
    adapter = ADAPTERS.get(type(module))
    if adapter is None or isinstance(reduced, str):  # a subclass, such as torch's wrappers
        return reduced
    return (patched_instance, (adapter.stock,), *reduced[2:])


def _reduce_class(cls: PatchedType) -> tuple[Any, ...] | str:
    return (patched_class, (ADAPTERS[cls].stock,)) if cls in ADAPTERS else cls.__qualname__


copyreg.pickle(PatchedType, _reduce_class)


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


def patch(model: Model, *, backend: str = "auto", frozen: bool = False) -> Model:
    """Make the blocks, stem and head of a timm or torchvision model run as fused kernels.

    Works in place and may be called again, for instance with another backend. Parameters, buffers, names, the
    ``state_dict``, ``isinstance`` and the names of classes stay as they are. What cannot be fused runs its stock
    forward; ``report`` lists it with the reason. Results are in channels-last memory.

    Only what is worth it by itself gets another class: not the modules inside a block that is fused as a whole, and
    nothing inside a module that has a method ``fuse_model``, which looks for stock classes.

    Args:
        model: any module with blocks of timm or torchvision inside.
        backend: backend of every fused call in this model; "auto" leaves it to ``use_backend``, the
            environment and the measured order.
        frozen: for deployment: from the first forward on, weights, settings and hooks are constants, and no call looks
            for changes. ``load_state_dict`` and ``to`` of the model or of a patched part of it begin anew at the next
            forward; training it, by ``train()`` or a forward for gradients, ends it. Other writes to weights, settings
            or hooks, what is done to the layers inside of a fused block alone, what another thread loads during a
            forward, and training under ``torch.compile`` are not seen: ``patch`` again.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no block of a known class in it, or no backend of that name.
        RuntimeError: the backend cannot run here.
        The model stays as it was whenever an exception leaves this function.
    """
    check_backend(backend)
    before: list[tuple[nn.Module, type[nn.Module], str | None, Frozen | None]] = []
    word = Frozen() if frozen else None
    try:
        known = _known(model)
        stock, sharded = _meant_for_fuse_model(model), gathered(model)
        inside: set[nn.Module] = set()  # of blocks that are fused as a whole
        for _, module in known:
            adapter = ADAPTERS.get(own_class(module))
            if adapter is None:
                continue
            d = module.__dict__
            before.append((module, type(module), d.get(BACKEND_ATTRIBUTE), d.get(FROZEN_ATTRIBUTE)))
            if module in stock or module in inside:
                _set(module, exchange(type(module), adapter.stock), None)
                continue
            _set(module, exchange(type(module), adapter.patched), None if backend == "auto" else backend, word)
            if any(part.calls is None and _explain(module, part, sharded)[0] for part in adapter.parts):
                inside.update(set(module.modules()) - {module})
    except BaseException:
        for module, cls, *words in before:
            _set(module, cls, *words)  # type: ignore[arg-type]
        raise
    return model


def unpatch(model: Model) -> Model:
    """The exact inverse of ``patch``: every module gets its own class back. Returns the same model.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_module(model)
    for module in model.modules():
        adapter = ADAPTERS.get(own_class(module))
        if adapter is not None:
            _set(module, exchange(type(module), adapter.stock), None)
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
    known = _known(model)
    stock, sharded = _meant_for_fuse_model(model), gathered(model)
    for name, module in known:
        if module in covered:
            continue
        cls = own_class(module)
        adapter = ADAPTERS.get(cls)
        if adapter is None:
            result.skipped.append((name, cls.__name__, UNSUPPORTED[cls]))
            continue
        if cls is adapter.stock and module in stock:
            result.skipped.append((name, cls.__name__, stock[module]))
            continue
        for part in adapter.parts:
            calls = part.replaced(module)
            row_name = name
            if part.calls is not None:
                row_name = " + ".join(f"{name}.{child}".lstrip(".") for child in calls)
            fused, what = _explain(module, part, sharded)
            row = (row_name, adapter.stock.__name__, what)
            (result.patched if fused else result.skipped).append(row)
            if fused:
                covered.update(inner for call in calls.values() if call is not None for inner in call.modules())
    return result


def _explain(module: nn.Module, part: Part, sharded: set[nn.Module]) -> tuple[bool, str]:
    """Whether the part is fused, and as what, or why not."""
    if internals.refusal:
        return False, internals.refusal
    try:
        read = part._replace(read=lambda block: part.read(as_gathered(block) if block in sharded else block))
        plan = plan_of(read, module)
    except Unfusable as reason:
        return False, str(reason)
    cls = own_class(module)
    if cls is ADAPTERS[cls].stock:
        return False, f"not patched: {plan}"
    backend = module.__dict__.get(BACKEND_ATTRIBUTE)
    words = [f"[{backend}]"] * (backend is not None) + ["[frozen]"] * (Frozen.of(module) is not None)
    return True, " ".join([str(plan), *words])


def _meant_for_fuse_model(model: nn.Module) -> dict[nn.Module, str]:
    """The modules inside one with a method ``fuse_model``, as torchvision's quantizable models have, and the reason.

    It takes modules apart by their exact type, and cannot be told of another.
    """
    return {
        inner: f"left to {type(module).__name__}.fuse_model()"
        for module in model.modules()
        if callable(getattr(module, "fuse_model", None))
        for inner in module.modules()
    }


def _known(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of a known class; raises if the model is no module or has none."""
    _check_module(model)
    load_adapters()
    known = [(name, m) for name, m in model.named_modules() if own_class(m) in UNSUPPORTED or _is_meant(m)]
    if not known:
        raise ValueError(
            f"model must have blocks of timm or torchvision to patch, found none in {type(model).__name__}"
        )
    return known


def _is_meant(module: nn.Module) -> bool:
    adapter = ADAPTERS.get(own_class(module))
    return adapter is not None and adapter.meant(module)


def load_adapters() -> None:
    """Fill ``ADAPTERS`` for the libraries that are imported."""
    for adapter, needed in _LIBRARIES.items():
        if all(module in sys.modules for module in needed):
            importlib.import_module(adapter)


def _set(module: nn.Module, cls: type[nn.Module], backend: str | None, frozen: Frozen | None = None) -> None:
    program.forget(module)
    module.__class__ = cls
    for name, value in ((BACKEND_ATTRIBUTE, backend), (FROZEN_ATTRIBUTE, frozen)):
        if value is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = value


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
