"""The comparison behind replayed calls, and the snapshot that spares it: no change goes unnoticed by either."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import effnet_kernels as ek
from effnet_kernels import native
from effnet_kernels.modules import replay
from tests.models import randomize

pytestmark = pytest.mark.skipif(not ek.backends()["cpu"][0], reason="the native CPU library is not built")


class Forgetful(replay.State):
    """Without snapshots, as where the library was built without Python's headers."""

    def _snapshot(self):
        snapshot = super()._snapshot()
        snapshot._pointer = None
        return snapshot


def make(cls):
    block = randomize(ek.MBConv(8, 8, exp_ratio=4.0, se_layer=ek.SqueezeExcite, act_layer=nn.SiLU)).eval()
    weights = [block.conv_pw.weight, block.conv_dw.weight, block.conv_pwl.weight]
    return block, cls(block, block.children(), weights, ["auto"])


def settings_of(module):
    return sorted(name for name, value in vars(module).items() if type(value) in replay._VALUES)


def entries_of(module):
    return [(contents, name) for contents in replay._CONTENTS for name in vars(module)[contents]]


def another(value):
    """An equal value that is another object, where there is one."""
    if type(value) is float:
        return float(repr(value))
    return (*value,) if type(value) is tuple else copy.copy(value)


# What to do with a module and a number that chooses among its attributes. The first leave everything as it was ...
NEUTRAL = {
    "training is set again": lambda m, i: m.train(m.training),
    "an equal value": lambda m, i: [setattr(m, name, another(vars(m)[name])) for name in settings_of(m)],
    "the same contents": lambda m, i: [vars(m)[c].update({name: vars(m)[c][name]}) for c, name in entries_of(m)],
    "a hook comes and goes": lambda m, i: m.register_forward_hook(print).remove(),
    "a hook elsewhere": lambda m, i: nn.Identity().register_forward_hook(print),
    "an attribute comes and goes": lambda m, i: [setattr(m, "note", i), delattr(m, "note")],
}
# ... and these do not.
CHANGES = {
    "training": lambda m, i: m.train(not m.training),
    "a value": lambda m, i: setattr(m, settings_of(m)[i % len(settings_of(m))], "another"),
    "an attribute less": lambda m, i: delattr(m, settings_of(m)[i % len(settings_of(m))]),
    "an attribute more": lambda m, i: setattr(m, "forward", print),
    "one for another": lambda m, i: [delattr(m, settings_of(m)[i % len(settings_of(m))]), setattr(m, "note", None)],
    "a forward hook": lambda m, i: m.register_forward_hook(print),
    "a backward hook": lambda m, i: m.register_full_backward_pre_hook(print),
    "class": lambda m, i: setattr(m, "__class__", type("Other", (type(m),), {})),
    "contents": lambda m, i: _replace(m, i),
    "contents less": lambda m, i: _remove(m, i),
}


def _replace(module, i):
    entries = entries_of(module)
    if entries:
        contents, name = entries[i % len(entries)]
        value = vars(module)[contents][name]
        vars(module)[contents][name] = nn.Identity() if value is None else copy.deepcopy(value)
    else:
        CHANGES["training"](module, i)


def _remove(module, i):
    entries = entries_of(module)
    if entries:
        contents, name = entries[i % len(entries)]
        del vars(module)[contents][name]
    else:
        CHANGES["training"](module, i)


@pytest.mark.parametrize("cls", [replay.State, Forgetful])
@given(
    st.lists(st.tuples(st.sampled_from(sorted(NEUTRAL)), st.integers(0, 99)), max_size=6),
    st.sampled_from(sorted(CHANGES)),
    st.integers(0, 99),
    st.integers(0, 99),
)
def test_any_change_is_noticed_and_nothing_else(cls, neutral, change, which, i):
    block, state = make(cls)
    modules = [m for m in block.modules() if m is not block]
    for name, number in neutral:
        NEUTRAL[name](modules[number % len(modules)], number)
        assert state.still()
    CHANGES[change](modules[which % len(modules)], i)
    assert not state.still()


@pytest.mark.parametrize("cls", [replay.State, Forgetful])
def test_settings_of_the_block_itself(cls):
    block, state = make(cls)
    block.register_forward_hook(print)  # of no matter: it is the caller's
    assert state.still()
    block.has_skip = not block.has_skip
    assert not state.still()


@pytest.mark.parametrize("cls", [replay.State, Forgetful])
def test_weights(cls):
    for change in (
        lambda w: w.mul_(2),
        lambda w: setattr(w, "data", w.data.clone()),
        lambda w: w.set_(torch.zeros_like(w)),
    ):
        block, state = make(cls)
        with torch.no_grad():
            block.bn1.weight.mul_(2)  # read at every call
            assert state.still()
            change(block.conv_dw.weight)
        assert not state.still()


def test_a_snapshot_is_taken_anew_after_a_change_of_nothing():
    block, state = make(replay.State)
    if not state.snapshot.holds():
        pytest.skip("the library was built without Python's headers")
    block.bn1.eps = another(block.bn1.eps)
    assert not state.snapshot.holds()
    assert state.still()
    assert state.snapshot.holds()


VALUES = [object() for _ in range(4)]
NAMES = [f"name{i}" for i in range(12)]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.sampled_from(NAMES), st.sampled_from(VALUES)),
        st.tuples(st.just("delete"), st.sampled_from(NAMES), st.none()),
        st.tuples(st.just("clear"), st.none(), st.none()),
    ),
    max_size=20,
)


def play(d, steps):
    for step, name, value in steps:
        if step == "set":
            d[name] = value
        elif step == "delete":
            d.pop(name, None)
        else:
            d.clear()


@given(STEPS, STEPS)
def test_a_snapshot_knows_every_entry(before, after):
    """Dictionaries that shrink, grow and are emptied behind it: it may cry wolf, and is never wrong."""
    d = {}
    play(d, before)
    snapshot = native.Snapshot([d, {}], [])
    items = [*d.items()]
    if native._snapshots() is not None:
        assert snapshot.holds()
    play(d, after)
    same = len(d) == len(items) and all(a is c and b is e for (a, b), (c, e) in zip(d.items(), items, strict=True))
    assert same or not snapshot.holds()


def test_a_snapshot_lets_go():
    class Value:
        pass

    value, d = Value(), {}
    d["value"], gone = value, weakref.ref(value)
    snapshot = native.Snapshot([d], [value])
    del d, value
    gc.collect()
    if native._snapshots() is not None:
        assert gone() is not None
    del snapshot
    gc.collect()
    assert gone() is None
