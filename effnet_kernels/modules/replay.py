"""Replaying a block that came down to one native call, and a model whose blocks all did.

Reading a block's modules, checking what was read and handing 25 tensors to a native op takes a few tenths of a
millisecond of Python, on a CPU at batch 1 as long as the block itself. So a call that ended in a single native op is
kept with its arguments, and repeated when nothing that it was made from has changed: no attribute, hook, child or
parameter of any module involved, no weight's version, no shape. All of that is compared at every call, most of it in C
(``native.Snapshot``); nothing has to be told about a change. What differs in any way takes the long way again.

Where a model's forward is nothing but such calls, each on the result of the one before, they are joined: one
comparison and one native call for all of them.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from effnet_kernels import native
from effnet_kernels.backends import requested
from effnet_kernels.internals import hooks_registered, version
from effnet_kernels.modules.guards import as_written, check_class, is_observed
from effnet_kernels.modules.reading import Unfusable
from effnet_kernels.ops import native_cpu

Reader = Callable[[nn.Module], Any]
Modules = Iterable[nn.Module | None]
_VALUES = (bool, int, float, str, tuple, type(None))
_CONTENTS = ("_parameters", "_buffers", "_modules")
# The containers of every module: what is in them is compared, or tells of hooks, which ``is_observed`` sees.
_OWN = frozenset(vars(nn.Module()))
_address = Tensor.data_ptr
# How many calls of one block are known at a time: a server that alternates between batch sizes needs a few.
FORMS = 4


class Plan(Protocol):
    def run(self, x: Tensor, backend: str) -> Tensor | None: ...


class Form(NamedTuple):
    """What a tensor is but for its contents."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> "Form":
        return cls(t.shape, t.stride(), t.dtype)


class State:
    """All that calls are made from, at one moment, but for x.

    Modules: who they are, their settings, what they hold, and that nobody watches them. Convolution weights, of
    which there are packed copies: their contents. The backend and instruction set that would be chosen.
    """

    def __init__(self, block: nn.Module, calls: Modules, weights: Iterable[Tensor], backends: Iterable[str]) -> None:
        self.modules = tuple(m for call in calls if call is not None for m in call.modules())
        self.types = [*map(type, self.modules)]
        self.classes = {type(block), *self.types}
        # The block's dictionary and not the block, which an entry must not keep alive.
        self.dicts = [block.__dict__, *(m.__dict__ for m in self.modules)]
        # ``training``, stride, epsilon, ...: everything that is a value and not a container.
        self.settings = [
            (d, itemgetter(*[name for name, value in d.items() if type(value) in _VALUES])) for d in self.dicts
        ]
        self.values = self._values()
        # Anything else (a torch.Size, a number of NumPy's, ...) has to be the same object.
        others = ([(d, name) for name in d.keys() - _OWN if type(d[name]) not in _VALUES] for d in self.dicts)
        self.others = [*chain.from_iterable(others)]
        self.sizes = [*map(len, self.dicts)]  # a forward of its own adds an entry
        self.contents = [d[name] for d in self.dicts for name in _CONTENTS if d[name]]
        self.held = self._held()
        self.handles = hooks_registered()
        self.weights = [*weights]
        self.versions, self.addresses = [*map(version, self.weights)], [*map(_address, self.weights)]
        self.backends = {backend: requested(backend) for backend in backends}
        self.generation = native.generation()
        self.snapshot = self._snapshot()
        # A stride in a list, an epsilon in a tensor, ... could be changed in place, which no comparison would see.
        names = "stride", "padding", "dilation", "groups", "eps"
        self.mutable = any(not isinstance(d.get(name), _VALUES) for d in self.dicts for name in names)

    def still(self) -> bool:
        """Whether all is as it was."""
        if not self.snapshot.holds():
            # Other objects may be of the same value: only a comparison tells.
            snapshot = self._snapshot()
            if not self._compare():
                return False
            self.snapshot = snapshot
        if [*map(version, self.weights)] != self.versions or [*map(_address, self.weights)] != self.addresses:
            return False
        if native.generation() != self.generation or not all(map(as_written, self.classes)):
            return False
        if any(requested(backend) != asked for backend, asked in self.backends.items()):
            return False
        if self.handles != hooks_registered():
            # Somebody has registered a hook somewhere: look whether it was here.
            if any(map(is_observed, self.modules)):
                return False
            self.handles = hooks_registered()
        return True

    def _snapshot(self) -> native.Snapshot:
        """Of all that ``_compare`` looks at."""
        return native.Snapshot([*self.dicts, *self.contents], self.modules)

    def _compare(self) -> bool:
        """Whether the modules have the same classes and contents, and settings of the same value."""
        try:
            if self._values() != self.values:
                return False
        except KeyError:
            return False
        if [*map(len, self.dicts)] != self.sizes or [*map(type, self.modules)] != self.types:
            return False
        held = self._held()
        return len(held) == len(self.held) and all(map(is_, held, self.held))

    def _values(self) -> list[Any]:
        return [get(d) for d, get in self.settings]

    def _held(self) -> list[Any]:
        held = chain.from_iterable(map(dict.values, self.contents))
        return [*held, *(d.get(name) for d, name in self.others)]


class Kept:
    """A native call kept with all its arguments but x and the output; ``number`` is its name in the library."""

    def __init__(self, state: State, x: Form, y: Form, number: int) -> None:
        self.state, self.x, self.y, self.number = state, x, y, number
        ops = torch.ops.effnet_kernels_cpu
        self.replay = ops.replay.default
        weakref.finalize(self, ops.forget.default, number).atexit = False

    def __call__(self, x: Tensor) -> Tensor:
        shape, strides, dtype = self.y
        y = torch.empty_strided(shape, strides, dtype=dtype, device=x.device)
        self.replay(self.number, y, x)
        return y


# By block and reader, by what x is: the kept call, or None after one that took the long way.
_known: dict[tuple[int, Reader], dict[Form, Kept | None]] = {}


def repeat(read: Reader, block: nn.Module, x: Tensor) -> Tensor | None:
    """The result of a kept call; None where there is none or something has changed since."""
    known = _known.get((id(block), read))
    kept = None if known is None else known.get(Form.of(x))
    if known is None or kept is None:
        return None
    if not kept.state.still():
        known.clear()
        return None
    return kept(x)


def run(read: Reader, block: nn.Module, calls: Modules, backend: str, x: Tensor, plan: Plan) -> Tensor | None:
    """``plan.run(x, backend)``, kept if its like was here before and it came down to one native op."""
    known, form = _known_calls(read, block), Form.of(x)
    if form not in known:
        _remember(known, form, None)
        return plan.run(x, backend)
    with native_cpu.watching() as ran:
        y = plan.run(x, backend)
    if y is not None and len(ran) == 1 and ran[0].repeats(x, y):
        call = ran[0]
        keep = getattr(torch.ops.effnet_kernels_cpu, f"keep_{call.op}").default
        number = keep(*call.leading[1:], *call.arguments[1:])
        state = _state(known) or State(block, calls, call.weights, [backend])
        if not state.mutable:
            _remember(known, form, Kept(state, form, Form.of(y), number))
    return y


class Route(NamedTuple):
    """A model's way from x to the result: fused calls only, each on what the one before gave."""

    modules: list[nn.Module]  # that the way passes, without the model itself
    calls: list[tuple[Reader, nn.Module]]  # in order


# Classes whose forward is ``fuse(read, self, x)`` where that has a result, and their readers.
BLOCKS: dict[type[nn.Module], Reader] = {}


def calls_in(module: nn.Module | None) -> Iterator[tuple[Reader, nn.Module]]:
    """The calls of a block, or of a Sequential of such; raises Unfusable where there is anything else to run."""
    if module is None or is_observed(module):
        raise Unfusable("a module on the way has hooks or a forward of its own")
    check_class(type(module))
    if type(module) is nn.Sequential:
        for child in module.__dict__["_modules"].values():
            yield from calls_in(child)
    elif type(module) in BLOCKS:
        yield BLOCKS[type(module)], module
    else:
        raise Unfusable(f"{type(module).__name__} is not a block")


def join(read: Callable[[nn.Module], Route], model: nn.Module, x: Tensor) -> Tensor | None:
    """The result of all calls on the route as one, which is kept; None unless each of them is kept for its input."""
    try:
        route = read(model)
    except (Unfusable, KeyError):
        return None
    links: list[Kept] = []
    form = Form.of(x)
    for call_read, block in route.calls:
        link = _known.get((id(block), call_read), {}).get(form)
        if link is None:
            return None
        links.append(link)
        form = link.y
    if not all(link.state.still() for link in links):
        return None
    known = _known_calls(read, model)
    weights = chain.from_iterable(link.state.weights for link in links)
    backends = chain.from_iterable(link.state.backends for link in links)
    state = _state(known) or State(model, route.modules, weights, backends)
    sizes = chain.from_iterable(link.y.shape for link in links[:-1])
    number = torch.ops.effnet_kernels_cpu.join.default([link.number for link in links], [*sizes])
    kept = Kept(state, links[0].x, form, number)
    _remember(known, kept.x, kept)
    return kept(x)


def _known_calls(read: Reader, block: nn.Module) -> dict[Form, Kept | None]:
    key = (id(block), read)
    if key not in _known:
        _known[key] = {}
        weakref.finalize(block, _known.pop, key, None).atexit = False
    return _known[key]


def _remember(known: dict[Form, Kept | None], form: Form, kept: Kept | None) -> None:
    known[form] = kept
    if len(known) > FORMS:
        known.pop(next(iter([*known])), None)


def _state(known: dict[Form, Kept | None]) -> State | None:
    """The state that other calls of the block were kept in, if it still holds: they share one."""
    state = next((kept.state for kept in [*known.values()] if kept is not None), None)
    return state if state is not None and state.still() else None
