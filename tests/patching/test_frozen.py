"""``patch(frozen=True)``: weights, settings and hooks are constants, until torch's own functions change them."""

import copy
import pickle

import pytest
import torch
from torch import nn

import effnet_kernels as ek
from effnet_kernels.modules.program import KEPT_ATTRIBUTE, Promises
from tests.patching.conftest import build

pytestmark = pytest.mark.skipif(not ek.backends()["cpu"][0], reason="the native CPU library is not built")


@pytest.fixture
def model():
    return ek.patch(build("test_efficientnet"), frozen=True)


@torch.inference_mode()
def run(model, x):
    """Twice, so that the second time is a program's."""
    return [model(x) for _ in range(2)][1]


def stock(model, x):
    with torch.no_grad():
        return ek.unpatch(copy.deepcopy(model))(x)


def is_current(model, x):
    expected = stock(model, x)
    return bool((run(model, x) - expected).abs().max() <= 1e-4 * expected.abs().max())


def double(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def is_frozen(model):
    fused = ek.report(model).patched
    return bool(fused) and all(what.endswith("[frozen]") for _, _, what in fused)


def test_same_bits_as_before(model, x):
    assert torch.equal(run(model, x), run(ek.patch(copy.deepcopy(model)), x))
    assert is_frozen(model)


def test_what_torch_is_not_told_is_constant(model, x):
    before = run(model, x)
    head = model.classifier.weight.clone()
    double(model)
    model.blocks[4][-1].bn1.eps = 0.5
    model.classifier.weight.data = head  # the classifier is torch's
    model.classifier.bias.data /= 1.5
    assert torch.allclose(run(model, x), before, atol=1e-5)
    ek.patch(model, frozen=True)
    assert is_current(model, x)


LOADS = {
    "load_state_dict": lambda m, state: m.load_state_dict(state),
    "assign": lambda m, state: m.load_state_dict(state, assign=True),
    "of a block": lambda m, state: m.blocks[4][-1].load_state_dict(
        {name.removeprefix("blocks.4.0."): t for name, t in state.items() if name.startswith("blocks.4.0.")}
    ),
    "to and back": lambda m, state: (double(m), m.double().float()),
    "half of the stages": lambda m, state: (double(m), m.blocks[4][-1].double().float()),
    "patch": lambda m, state: (double(m), ek.patch(m, frozen=True)),
}


@pytest.mark.parametrize("load", LOADS)
def test_loading_and_moving_begin_anew(load, model, x):
    run(model, x)
    twin = copy.deepcopy(model)
    double(twin)
    LOADS[load](model, {name: t.clone() for name, t in twin.state_dict().items()})
    assert is_current(model, x)
    assert is_frozen(model)
    before = run(model, x)
    model.blocks[4][-1].conv_pw.weight.data.zero_()
    assert torch.equal(run(model, x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_channels_last_and_16_bits_behind_patch(dtype, model, x):
    model.to(memory_format=torch.channels_last).to(dtype)
    y = run(model, x.to(dtype))
    assert torch.equal(y, run(ek.patch(copy.deepcopy(model)), x.to(dtype)))
    assert is_frozen(model)


THAWS = {
    "train": lambda m, x: m.train().eval(),
    "train of a block": lambda m, x: m.blocks[4][-1].train(),
    "a forward for gradients": lambda m, x: m(x),
    "unpatch": lambda m, x: ek.unpatch(m),
    "patch": lambda m, x: ek.patch(m),
}


@pytest.mark.parametrize("thaw", THAWS)
def test_training_ends_it(thaw, model, x):
    for form in (x, x[:1]):
        run(model, form)
    THAWS[thaw](model, x)
    model.eval()
    assert not is_frozen(model)
    for _ in range(2):
        assert is_current(model, x)
        assert is_current(model, x[:1])
        double(model)
    model.blocks[4][-1].conv_dw.weight.data[0] += 1
    assert is_current(model, x)


def test_it_may_come_before_eval(x):
    model = ek.patch(build("test_efficientnet").train(), frozen=True).eval()
    before = run(model, x)
    double(model.blocks)
    assert torch.equal(run(model, x), before)


def test_forms_of_input_are_of_one_mind(model, x):
    before = run(model, x)
    double(model.blocks)
    assert torch.allclose(run(model, x[:1]), before[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_frozen_for_themselves(clone, model, x):
    before = run(model, x)
    twin = clone(model)
    double(twin)
    assert is_current(twin, x)
    assert is_frozen(twin)
    twin.train()
    assert is_frozen(model)
    assert torch.equal(run(model, x), before)


def test_a_frozen_program_holds_nothing_of_the_model(model, x):
    """Not a byte that it reads is the model's: torch may free or move the weights behind it."""
    before = run(model, x)
    for p in (*model.blocks.parameters(), *model.conv_stem.parameters(), *model.bn1.buffers()):
        p.untyped_storage().resize_(0)
    with torch.inference_mode():
        assert torch.equal(model(x), before)
    assert all(
        isinstance(p.state, Promises) and len(p.table) == 0 for p in vars(model)[KEPT_ATTRIBUTE].programs.values()
    )


def test_words_of_parts(model, x):
    """A part that was frozen by another call of patch, and then alone is loaded or trained."""
    ek.patch(model.blocks[4], frozen=True)
    run(model, x)
    double(model.blocks[4])
    model.blocks[4][-1].load_state_dict(model.blocks[4][-1].state_dict())
    assert is_current(model, x)
    model.blocks[4].train().eval()
    double(model.blocks[4])
    assert is_current(model, x)


@pytest.mark.parametrize("assign", [False, True])
def test_a_forward_in_the_midst_of_loading(assign, model, x):
    """What it sees is a mixture, which must not become a constant."""
    run(model, x)
    twin = copy.deepcopy(model)
    double(twin)
    state = {name: t.clone() for name, t in twin.state_dict().items()}

    def look(*_):
        run(model, x)

    hooks = [m.register_load_state_dict_pre_hook(look) for m in model.modules()]
    assert len(hooks) > 10
    model.load_state_dict(state, assign=assign)
    assert is_current(model, x)


def test_a_shallow_copy_has_programs_of_its_own(model, x):
    before = run(model, x)
    twin = copy.copy(model)
    twin.blocks = nn.Sequential(*[*model.blocks][:-1])
    twin.conv_head = nn.Conv2d(48, 256, 1, bias=False)
    assert is_current(twin, x)
    assert torch.equal(run(model, x), before)
