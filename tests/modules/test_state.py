"""The comparison of modules behind programs: no change goes unnoticed."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import effnet_kernels as ek
from effnet_kernels.modules.program import _WITHOUT_SETTINGS, Guards
from tests.models import randomize

pytestmark = pytest.mark.skipif(not ek.backends()["cpu"][0], reason="the native CPU library is not built")


VALUES = (bool, int, float, str, tuple, type(None))
CONTENTS = ("_parameters", "_buffers", "_modules")


def make():
    block = randomize(ek.MBConv(8, 8, exp_ratio=4.0, se_layer=ek.SqueezeExcite, act_layer=nn.SiLU)).eval()
    return block, Guards(block, [m for m in block.modules() if m is not block])


def settings_of(module):
    return sorted(name for name, value in vars(module).items() if type(value) in VALUES)


def entries_of(module):
    return [(contents, name) for contents in CONTENTS for name in vars(module)[contents]]


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


@given(
    st.lists(st.tuples(st.sampled_from(sorted(NEUTRAL)), st.integers(0, 99)), max_size=6),
    st.sampled_from(sorted(CHANGES)),
    st.integers(0, 99),
    st.integers(0, 99),
)
def test_any_change_is_noticed_and_nothing_else(neutral, change, which, i):
    block, state = make()
    modules = [m for m in block.modules() if m is not block]
    for name, number in neutral:
        NEUTRAL[name](modules[number % len(modules)], number)
        assert state.hold(block)
    read = [m for m in modules if type(m) not in _WITHOUT_SETTINGS]
    CHANGES[change](read[which % len(read)], i)
    assert not state.hold(block)


def test_settings_of_the_block_itself():
    block, state = make()
    block.register_forward_hook(print)  # of no matter: it is the caller's
    assert state.hold(block)
    block.has_skip = not block.has_skip
    assert not state.hold(block)


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(1), [1], object()], ids=lambda v: type(v).__name__)
def test_attributes_of_any_kind(value):
    """Comparing them may raise, and must not."""
    block = make()[0]
    block.conv_pw.note = value
    state = Guards(block, [m for m in block.modules() if m is not block])
    assert state.hold(block)
    block.conv_pw.note = torch.zeros(3)
    assert not state.hold(block)


@pytest.mark.parametrize("change", ["an attribute more", "a forward hook", "a backward hook", "class"])
def test_activations_have_no_settings_but_may_be_watched(change):
    block, state = make()
    block.bn1.act.train()
    assert state.hold(block)
    CHANGES[change](block.bn1.act, 0)
    assert not state.hold(block)
