"""Programs: what is kept of a forward that came down to native calls, and when it may be repeated.

Reading modules, checking what was read and making each native call takes a few tenths of a millisecond of Python a
block, on a CPU at batch 1 as long as the block itself. So the calls of a forward are recorded where they are made
(``ops/recording.py``), and if each was made on the result of the one before, they are the program of that forward: of
a block one call, of a model all of them. It is repeated as long as nothing has changed that it was made from. The
modules, their settings, who watches them and where all tensors lie are compared here, at every call; the contents of
all tensors by the library, while it computes. Nobody has to tell of a change. What differs in any way takes the long
way.

Under ``patch(frozen=True)`` nothing of this is compared. On a GPU, where kernels read the weights where they are and
Python runs ahead of them, that is the only time that anything is kept: the forward of a model as a CUDA graph.

A program belongs to the module whose forward it is, in whose dictionary it stands. This is the only file that keeps
anything across calls.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain
from operator import eq, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels.dispatch import requested
from effnet_kernels.internals import hooks_registered
from effnet_kernels.modules.captured import ON_GPU, Captured
from effnet_kernels.modules.guards import as_written, is_observed
from effnet_kernels.ops import native_cpu
from effnet_kernels.ops.common import autocast_dtype, to_nhwc
from effnet_kernels.ops.recording import Recording, converted, current, recording

# Attributes of modules, and of nobody else: what is kept, the promise of ``patch(frozen=True)``, and its backend.
KEPT_ATTRIBUTE = "_effnet_kernels_kept"
FROZEN_ATTRIBUTE = "_effnet_kernels_frozen"
BACKEND_ATTRIBUTE = "_effnet_kernels_backend"
# Of how many forms of input programs are kept: a server that alternates between batch sizes needs a few.
FORMS = 4
# Classes whose forward is no more than the plan of a whole block, where that has a result.
REPLACEABLE: set[type[nn.Module]] = set()
_WITHOUT_SETTINGS = {nn.Identity, nn.SiLU, nn.ReLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid}
_VALUES = (bool, int, float, str, tuple, type(None))


class Form(NamedTuple):
    """What a tensor is but for its contents, and what autocast makes of it."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    autocast: torch.dtype | None

    @classmethod
    def of(cls, t: Tensor) -> "Form":
        return cls(t.shape, t.stride(), t.dtype, autocast_dtype(t))


class Frozen:
    """The promise that weights and settings are constants, shared by all modules that one call of ``patch`` has frozen.

    Programs hold for one ``epoch``: loading weights or moving the model begins another; training ends the promise.
    """

    def __init__(self) -> None:
        self.holds = True
        self.epoch = 0

    @staticmethod
    def of(module: nn.Module) -> "Frozen | None":
        """The promise that was given for a module, if it holds."""
        frozen = vars(module).get(FROZEN_ATTRIBUTE)
        return frozen if frozen is not None and frozen.holds else None


class Promises:
    """Those that were given for a module and all parts of it that are patched, at one moment."""

    def __init__(self, owner: nn.Module, modules: Iterable[nn.Module]) -> None:
        patched = [owner, *(module for module in modules if type(module) in REPLACEABLE)]
        promises = {id(promise): promise for promise in map(Frozen.of, patched)}
        self.promises = [(promise, promise.epoch) for promise in promises.values() if promise is not None]
        self.given = len(self.promises) == len(promises)

    def hold(self, owner: nn.Module) -> bool:
        """Whether all of them hold, and nothing was loaded or moved since."""
        return Frozen.of(owner) is not None and all(p.holds and p.epoch == epoch for p, epoch in self.promises)


class Guards:
    """What a program was made from but for the contents of tensors: modules, and that nobody watches them.

    Args:
        owner: the module whose program it is.
        modules: those whose calls the program stands for, with all below them.
    """

    def __init__(self, owner: nn.Module, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.types = [*map(type, modules)]
        self.classes = {type(owner), *self.types}
        # Entries that are values are compared as such; of others, such as the containers, it has to be the same object.
        # What has no setting that its forward reads may still get a forward of its own.
        self.plain = [vars(module) for module in modules if type(module) in _WITHOUT_SETTINGS]
        self.dicts = [vars(module) for module in modules if type(module) not in _WITHOUT_SETTINGS]
        self.sizes = [*map(len, self.plain)]
        self.copies = [*map(dict, self.dicts)]
        self.own = _settings(owner)
        everything = [vars(owner), *self.dicts]
        # An empty Sequential, which may get children, is no leaf.
        containers = {id(vars(module)) for module in modules if type(module) is nn.Sequential}
        self.children = [d["_modules"] for d in everything if d["_modules"] or id(d) in containers]
        self.children_copies = [*map(dict, self.children)]
        self.holders = [d[name] for d in everything for name in ("_parameters", "_buffers") if d[name]]
        self.tensors = [*chain.from_iterable(map(dict.values, self.holders))]
        self.handles = hooks_registered()
        backends = {d.get(BACKEND_ATTRIBUTE, "auto") for d in everything}
        self.backends = {backend: requested(backend) for backend in backends}

    @staticmethod
    def sees_all(owner: nn.Module, modules: Iterable[nn.Module]) -> bool:
        """Whether a comparison can see every change: none of a stride in a list, or inside of a ScriptModule."""
        names = "stride", "padding", "dilation", "groups", "eps"
        everything = [vars(owner), *map(vars, modules)]
        return all(
            isinstance(d.get("_modules"), dict) and all(isinstance(d.get(name), _VALUES) for name in names)
            for d in everything
        )

    def hold(self, owner: nn.Module) -> bool:
        """Whether all is as it was."""
        try:
            same = (
                self.own == _settings(owner)
                and all(map(eq, self.dicts, self.copies))
                and all(map(eq, self.children, self.children_copies))
            )
        except Exception:  # of an attribute that cannot be compared
            return False
        if not same or [*map(type, self.modules)] != self.types or [*map(len, self.plain)] != self.sizes:
            return False
        held = [*chain.from_iterable(map(dict.values, self.holders))]
        if len(held) != len(self.tensors) or not all(map(is_, held, self.tensors)):
            return False
        if not all(map(as_written, self.classes)):
            return False
        if any(requested(backend) != asked for backend, asked in self.backends.items()):
            return False
        if self.handles != hooks_registered():
            # Somebody has registered a hook somewhere: look whether it was here.
            if any(map(is_observed, self.modules)):
                return False
            self.handles = hooks_registered()
        return True


def _settings(owner: nn.Module) -> dict[str, Any]:
    """The owner's dictionary without what is kept there, which would keep itself alive."""
    settings = vars(owner).copy()
    settings.pop(KEPT_ATTRIBUTE, None)
    return settings


class Program:
    """The calls of one forward, for inputs of one form.

    Args:
        made: what was recorded.
        y: what came of it.
        state: what it was made from, or the promises that this is constant.
    """

    def __init__(self, made: Recording, y: Tensor, state: Guards | Promises) -> None:
        constant = isinstance(state, Promises)
        self.calls = [call._replace(memory=[], table=native_cpu.NO_TABLE) if constant else call for call in made.calls]
        self.covered, self.state = made.covered, state
        self.x, self.y = Form.of(made.first), Form.of(y)
        self.kept = torch.cat([call.kept for call in self.calls])
        self.sources = [] if constant else [t for call in self.calls for t in call.sources]
        self.places = native_cpu.places([t for call in self.calls for t in call.memory])
        self.table = torch.cat([call.table for call in self.calls])
        self.replay = native_cpu.replay()

    def holds(self, owner: nn.Module) -> bool:
        """Whether it still is what the long way would do, if the contents of all tensors are what they were."""
        return self.state.hold(owner) and native_cpu.places(self.sources) == self.places

    def __call__(self, x: Tensor) -> Tensor | None:
        """The result; None if a tensor has changed, or the instruction set."""
        first = x if x.dtype == self.x.dtype else converted(x, Tensor.to, self.x.dtype)
        if first.stride() != self.x.strides:
            first = converted(first, to_nhwc)
        y = torch.empty_strided(self.y.shape, self.y.strides, dtype=self.y.dtype, device=x.device)
        if not self.replay(self.kept, self.table, y, first):
            return None
        into = current()
        if into is not None:
            into.follow(x, first, self.calls, y)
        return y


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def may_keep(x: Tensor) -> bool:
    """Whether a plan that runs on x can be repeated, or is of something that can."""
    return (x.is_cpu and not on_gpu(x)) or current() is not None


class Programs:
    """The programs of one module, by what they stand for and the form of the input. Copies of the module start anew."""

    def __init__(self, owner: int = 0) -> None:
        self.owner = owner  # its id: a shallow copy finds this in its dictionary, too
        self.programs: dict[tuple[Hashable, Form], Program | Captured] = {}
        # What was recorded and was no program: how often it is not to be tried again, now and after another failure.
        self.pauses: dict[Hashable, tuple[int, int]] = {}

    @staticmethod
    def by(owner: nn.Module) -> "Programs":
        kept = vars(owner).get(KEPT_ATTRIBUTE)
        if kept is None or kept.owner != id(owner):
            kept = vars(owner)[KEPT_ATTRIBUTE] = Programs(id(owner))
        return kept

    def __reduce__(self) -> tuple[type["Programs"], tuple[()]]:
        return Programs, ()

    def of(self, key: Hashable) -> list[Program | Captured]:
        return [program for (other, _), program in [*self.programs.items()] if other == key]

    def pausing(self, key: Hashable) -> bool:
        """Whether this call is one of those for which nothing is recorded."""
        left, pause = self.pauses.get(key, (0, 1))
        if left > 0:
            self.pauses[key] = left - 1, pause
        return left > 0

    def settle(self, key: Hashable, form: Form, program: Program | Captured | None) -> None:
        """Keep what was recorded; if that was no program, try again after more and more calls."""
        self.programs.pop((key, form), None)
        if program is None:
            pause = self.pauses.get(key, (0, 1))[1]
            self.pauses[key] = pause, min(2 * pause, 64)
            return
        self.pauses.pop(key, None)
        self.programs[key, form] = program
        names = [name for name in [*self.programs] if name[0] == key]
        for name in names[:-FORMS]:
            self.programs.pop(name, None)


Kept = Programs  # its name in pickles of patched models that were saved before it had this one


def repeat(key: Hashable, owner: nn.Module, x: Tensor) -> Tensor | None:
    """The result of a program of the owner's; None where there is none, or something has changed since."""
    kept = vars(owner).get(KEPT_ATTRIBUTE)
    program = None if kept is None or kept.owner != id(owner) else kept.programs.get((key, Form.of(x)))
    if program is None or not program.holds(owner):
        return None
    _cover(owner, program.covered)
    return program(x)


def record(
    key: Hashable,
    owner: nn.Module,
    left_out: Iterable[nn.Module | None],
    x: Tensor,
    run: Callable[[Tensor], Tensor | None],
) -> Tensor | None:
    """``run(x)``, kept if it came down to a program.

    Args:
        key: what of the owner it is.
        left_out: the modules whose calls it takes the place of.
    """
    outer, modules = current(), [*_below(left_out)]
    if on_gpu(x):
        y = run(x)
        if outer is not None and y is not None:
            outer.follow(x, x, [ON_GPU], y)
            _cover(owner, {*map(id, modules)})
        return y
    kept, form = Programs.by(owner), Form.of(x)
    if kept.pausing(key) or not Guards.sees_all(owner, modules):
        with recording(None):
            y = run(x)
        if outer is not None:
            outer.lose()
        return y
    state = _state(kept, key, owner, modules)
    y, made = _recorded(kept.of(key), owner, x, run)
    made.covered.update(map(id, modules))
    _cover(owner, made.covered)
    if y is not None:
        kept.settle(key, form, _program(made, y, owner, state) if made.ends_in(y) else None)
    return y


def record_all(
    key: Hashable, owner: nn.Module, calls: Iterable[nn.Module | None], x: Tensor, run: Callable[[Tensor], Tensor]
) -> Tensor:
    """``run(x)``, kept if it came down to a program and the calls that it makes of modules can be left out."""
    if not x.is_cpu and (Frozen.of(owner) is None or not on_gpu(x) or torch.cuda.is_current_stream_capturing()):
        return run(x)
    kept, modules = Programs.by(owner), [*_below(calls := [*calls])]
    if kept.pausing(key) or not Guards.sees_all(owner, modules):
        return run(x)
    for module in modules:
        if type(module) in REPLACEABLE:
            Programs.by(module)  # an entry of its dictionary, which is compared
    state = _state(kept, key, owner, modules)
    y, made = _recorded(kept.of(key), owner, x, run)
    program: Program | Captured | None = None
    if made.ends_in(y) and all(_may_be_left_out(call, made.covered) for call in calls):
        if isinstance(state, Promises) and on_gpu(x):
            program = Captured(run, x, modules, state) if state.hold(owner) else None
        else:
            program = _program(made, y, owner, state)
    kept.settle(key, Form.of(x), program)
    return y


def _recorded(
    known: Sequence[Program | Captured], owner: nn.Module, x: Tensor, run: Callable[[Tensor], Any]
) -> tuple[Any, Recording]:
    constant = [program for program in known if isinstance(program.state, Promises) and program.holds(owner)]
    alike = constant or [program for program in known if isinstance(program.state, Guards)]
    made = Recording(x, [call for program in alike for call in program.calls], bool(constant))
    with recording(made):
        y = run(x)
    outer = current()
    if outer is not None:
        outer.follow(x, made.first, made.calls, y) if made.ends_in(y) else outer.lose()
    return y, made


def _state(kept: Programs, key: Hashable, owner: nn.Module, modules: list[nn.Module]) -> Guards | Promises:
    """What a forward that is about to be recorded is made from; programs for other forms share it."""
    promises = Promises(owner, modules)
    if promises.given:
        return promises
    states = (program.state for program in kept.of(key))
    return next((s for s in states if isinstance(s, Guards) and s.hold(owner)), None) or Guards(owner, modules)


def _program(made: Recording, y: Tensor, owner: nn.Module, state: Guards | Promises) -> Program | None:
    """What was recorded as a program; None if something has changed meanwhile, or is not the modules'."""
    if not state.hold(owner):
        return None
    if isinstance(state, Guards):
        held = {*map(id, state.tensors)}
        if not all(id(source) in held for call in made.calls for source in call.sources):
            return None
    return Program(made, y, state)


def _below(modules: Iterable[nn.Module | None]) -> Iterable[nn.Module]:
    """These modules and all in them, each once."""
    return dict.fromkeys(inner for module in modules if module is not None for inner in module.modules())


def _may_be_left_out(module: nn.Module | None, covered: set[int]) -> bool:
    """Whether a module's call is no more than the calls that were recorded: those of a block, or of a Sequential."""
    if module is None or is_observed(module) or not as_written(type(module)):
        return False
    if type(module) is nn.Sequential:
        return all(_may_be_left_out(child, covered) for child in vars(module)["_modules"].values())
    return id(module) in covered


def _cover(owner: nn.Module, covered: set[int]) -> None:
    """Tell whoever records that calls of these modules were left out and, if it is no more than that, the owner's."""
    outer = current()
    if outer is not None:
        outer.covered |= covered
        if type(owner) in REPLACEABLE:
            outer.covered.add(id(owner))


def forget(module: nn.Module) -> None:
    """Let go of all that is kept of a module, and begin another epoch if it is frozen."""
    vars(module).pop(KEPT_ATTRIBUTE, None)
    frozen = vars(module).get(FROZEN_ATTRIBUTE)
    if frozen is not None:
        frozen.epoch += 1


def thaw(module: nn.Module) -> None:
    """End the promise that a module's weights and settings are constants, for all that it was given for."""
    frozen = vars(module).get(FROZEN_ATTRIBUTE)
    if frozen is not None:
        frozen.holds = False
