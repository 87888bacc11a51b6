"""Whole models as one program: when they are, and that nothing goes unnoticed."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import effnet_kernels as ek
from tests.criterion import assert_same_function
from tests.models import images
from tests.patching.conftest import NAMES, build
from tests.programs import replayed, the_long_way, warm

__all__ = ["replayed"]

pytestmark = pytest.mark.skipif(not ek.backends()["cpu"][0], reason="the native CPU library is not built")


@pytest.fixture
def patched():
    return ek.patch(build("test_efficientnet"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_the_second_call_is_one(name, dtype, replayed):
    """The same bits as block by block, also for another image."""
    with torch.inference_mode(False):
        model = ek.patch(build(name)).to(dtype)
    x, other = images(2, 37).to(dtype), images(2, 37, seed=5).to(dtype)
    first = model(x)
    assert not replayed
    assert torch.equal(model(x), first)
    assert len(replayed) == 1
    assert torch.equal(model(other), the_long_way(model, other))
    assert len(replayed) == 2


def test_features_are_a_route_of_their_own(patched, x, replayed):
    expected = warm(patched, x)[0]
    with torch.inference_mode():
        features = [patched.forward_features(x) for _ in range(3)]
        assert torch.equal(features[2], features[0])
        assert features[2].stride() == features[0].stride()
        replayed.clear()
        assert torch.equal(patched.forward_features(x), features[0])
        assert torch.equal(patched(x), expected)
    assert len(replayed) == 2


def block(model):
    return model.blocks[4][-1]


def _append(model):
    model.blocks[4].append(copy.deepcopy(block(model)))


def _replace_by_stock(model):
    model.blocks[4] = ek.unpatch(copy.deepcopy(model.blocks[4]))
    with torch.no_grad():
        block(model).conv_pw.weight.mul_(2)


def _load(model):
    model.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def _step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(images(2, 37)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _write(model):
    with torch.no_grad():
        block(model).conv_dw.weight.mul_(2)


def _double_output(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


def _double_stage(model):
    class Doubled(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * 2

    model.blocks[4].__class__ = Doubled


def _double_block(model):
    class Doubled(type(block(model))):
        def forward(self, x):
            return super().forward(x) * 2

    block(model).__class__ = Doubled


class _Double(nn.Module):
    def forward(self, x):
        return x * 2


CHANGES = {
    "load_state_dict": _load,
    "optimizer step": _step,
    "weight in place": _write,
    "weight.data": lambda m: setattr(block(m).conv_pw.weight, "data", block(m).conv_pw.weight * 2),
    "parameter": lambda m: setattr(block(m).conv_pw, "weight", nn.Parameter(block(m).conv_pw.weight * 2)),
    "buffer": lambda m: setattr(block(m).bn2, "running_var", block(m).bn2.running_var * 4),
    "epsilon of the stem": lambda m: setattr(m.bn1, "eps", 1.0),
    "epsilon of a block": lambda m: setattr(block(m).bn1, "eps", 1.0),
    "epsilon of the head": lambda m: setattr(m.bn2, "eps", 1.0),
    "stride": lambda m: setattr(m.conv_stem, "stride", (1, 1)),
    "activation": lambda m: setattr(block(m).bn1, "act", nn.ReLU()),
    "pool": lambda m: m.reset_classifier(10, "max"),
    "a block less": lambda m: m.blocks[4].__delitem__(-1),
    "a block more": _append,
    "a stock stage": _replace_by_stock,
    "children of an empty Sequential": lambda m: m.blocks[4][-1].append(_Double()),
    "class of a stage": _double_stage,
    "class of a block": _double_block,
    "forward of a stage": lambda m: _double_output(m.blocks[4]),
    "forward of a block": lambda m: _double_output(block(m)),
    "forward of all blocks": lambda m: _double_output(m.blocks),
    "forward of a convolution": lambda m: _double_output(block(m).conv_dw),
    "forward of the head": lambda m: _double_output(m.conv_head),
    "forward_features": lambda m: setattr(m, "forward_features", lambda x: type(m).forward_features(m, x) * 2),
    "hook on the stem": lambda m: m.conv_stem.register_forward_hook(lambda _m, _i, y: y * 2),
    "hook on all blocks": lambda m: m.blocks.register_forward_hook(lambda _m, _i, y: y * 2),
    "hook on a stage": lambda m: m.blocks[4].register_forward_pre_hook(lambda _m, i: i[0] * 2),
    "hook on a block": lambda m: block(m).register_forward_hook(lambda _m, _i, y: y * 2),
    "hook on a convolution": lambda m: block(m).conv_dw.register_forward_hook(lambda _m, _i, y: y * 2),
    "hook on the pool": lambda m: m.global_pool.register_forward_hook(lambda _m, _i, y: y * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change, x):
    """By the next call and, once that is settled, by those that are kept after it."""
    model = build("tf_efficientnetv2_b0")
    if "empty" in change:
        model.blocks[4].append(nn.Sequential())
    before = warm(ek.patch(model), x)[0]
    CHANGES[change](model)
    with torch.inference_mode():
        got = [model(x) for _ in range(5)]
    # deepcopy would leave a forward on the instance bound to the original, so the stock modules tell what is right
    with torch.no_grad():
        expected = ek.unpatch(model)(x)
    assert all(torch.equal(y, got[0]) for y in got)
    assert_same_function(got[0], expected)
    assert not torch.allclose(got[0], before, rtol=1e-3, atol=1e-3), "the change changed nothing"


def test_hooks_are_called(patched, x, replayed):
    warm(patched, x)
    replayed.clear()
    seen = []
    handles = [m.register_forward_hook(lambda m, *_: seen.append(m)) for m in (patched.blocks[4], block(patched))]
    with torch.inference_mode():
        for _ in range(4):
            patched(x)
        assert len(seen) == 8
        assert len(replayed) > 4  # block by block
        for handle in handles:
            handle.remove()
        for _ in range(4):
            patched(x)
        replayed.clear()
        patched(x)
    assert len(seen) == 8
    assert len(replayed) == 1


def test_training_and_back(patched, x, replayed):
    warm(patched, x)
    twin = copy.deepcopy(patched)
    for model in (patched, twin):
        model.train()
        with torch.no_grad():
            model(x)
        model.eval()
    assert torch.equal(patched.bn2.running_mean, twin.bn2.running_mean)
    replayed.clear()
    with torch.inference_mode():
        got = [patched(x) for _ in range(4)]
    expected = the_long_way(twin, x)
    assert all(torch.equal(y, expected) for y in got)
    assert len(replayed) == 3


def test_one_batch_norm_in_training(patched, x):
    warm(patched, x)
    twin = copy.deepcopy(patched)
    for model in (patched, twin):
        block(model).bn1.train()
        with torch.no_grad():
            model(x)
    assert torch.equal(block(patched).bn1.running_mean, block(twin).bn1.running_mean)


def test_half_and_back(patched, x, replayed):
    warm(patched, x)
    for model in (patched, twin := copy.deepcopy(patched)):
        model.half().float()
    expected = the_long_way(twin, x)
    replayed.clear()
    with torch.inference_mode():
        assert all(torch.equal(patched(x), expected) for _ in range(4))
    assert len(replayed) == 3


def test_gradients_autocast_and_dispatch_take_the_long_way(patched, x, replayed):
    warm(patched, x)
    replayed.clear()
    patched(x).sum().backward()
    assert all(p.grad is not None for p in patched.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert patched(x).dtype == torch.bfloat16
    with torch.no_grad(), FlopCounterMode(display=False):
        patched(x)
    assert not replayed


def test_other_ways_through_the_model(patched, x, replayed):
    """Intermediate features, checkpointing and features_only see every stage."""
    stock = ek.unpatch(copy.deepcopy(patched))
    warm(patched, x)
    with torch.no_grad():
        _, features = patched.forward_intermediates(x)
        _, expected = stock.forward_intermediates(x)
    for y, s in zip(features, expected, strict=True):
        assert_same_function(y, s)
    replayed.clear()
    patched.set_grad_checkpointing(True)
    with torch.inference_mode():
        patched(x)
    assert len(replayed) != 1


def test_a_choice_of_backend_is_noticed(patched, x, replayed, monkeypatch):
    warm(patched, x)
    replayed.clear()
    with torch.inference_mode():
        with ek.use_backend("reference"):
            patched(x)
        monkeypatch.setenv("EFFNET_KERNELS_BACKEND", "reference")
        patched(x)
        monkeypatch.undo()
        ek.patch(block(patched), backend="reference")
        patched(x)
    assert not replayed


def test_unpatching_is_noticed(patched, x, replayed):
    first = warm(patched, x)[0]
    replayed.clear()
    ek.unpatch(patched)
    with torch.inference_mode():
        patched(x)
        assert not replayed
        ek.patch(patched)
        assert torch.equal(patched(x), first)


def test_threads_change_nothing(patched, x, replayed):
    before = warm(patched, x)[0]
    threads = torch.get_num_threads()
    replayed.clear()
    try:
        with torch.inference_mode():
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                assert torch.equal(patched(x), before)
    finally:
        torch.set_num_threads(threads)
    assert len(replayed) == 3


CYCLES = {
    "none": lambda m: None,
    "hook": lambda m: m.global_pool.register_forward_hook(lambda *_: m and None),
    "bound method": lambda m: setattr(m.classifier, "owner", m.forward_features),
    "wrapped forward": lambda m: setattr(m, "forward", lambda x: type(m).forward(m, x)),
    "attribute": lambda m: setattr(block(m), "model", [m]),
    "compiled": lambda m: m.compile(backend="eager"),
}


@pytest.mark.parametrize("cycle", CYCLES)
def test_what_is_kept_dies_with_the_model(cycle, x, replayed):
    patched = ek.patch(build("test_efficientnet"))
    CYCLES[cycle](patched)
    warm(patched, x)
    model = ek.patch(build("test_efficientnet"))
    warm(model, x)
    gone = [weakref.ref(t) for t in (patched, *patched.parameters(), *(t for p in replayed[:-1] for t in p.kept))]
    assert cycle == "compiled" or len(gone) > len([*patched.parameters()]) + 1
    del patched
    replayed.clear()
    torch.compiler.reset()
    gc.collect()
    assert not any(ref() is not None for ref in gone)


def _assign(model):
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [ek.unpatch, _assign, lambda m: m.to(torch.bfloat16)], ids=["unpatch", "load", "to"])
def test_nothing_is_kept_of_tensors_that_are_gone(change, patched, x, replayed):
    warm(patched, x)
    gone = [weakref.ref(t) for program in replayed for call in program.calls for t in (call.packed, call.table)]
    gone += [weakref.ref(p) for p in patched.parameters()] if change is _assign else []
    replayed.clear()
    change(patched)
    gc.collect()
    assert gone
    assert not any(ref() is not None for ref in gone)


MEANWHILE = {
    "hook": lambda m: block(m).conv_dw.register_forward_hook(lambda _m, _i, y: y * 2),
    "epsilon": lambda m: setattr(block(m).bn1, "eps", 1.0),
    "activation": lambda m: setattr(block(m).bn1, "act", nn.ReLU()),
    "training": lambda m: block(m).bn1.train(),
    "weight": lambda m: block(m).conv_pw.weight.data.mul_(2),
}


@pytest.mark.parametrize("change", MEANWHILE)
def test_a_change_in_the_midst_of_recording(change, patched, x):
    """Made behind the blocks that it concerns, by a hook that takes itself away."""

    def once(*_):
        handle.remove()
        MEANWHILE[change](patched)

    handle = patched.blocks.register_forward_hook(once)
    with torch.no_grad():
        patched(x)
        for _ in range(3):
            expected = ek.unpatch(copy.deepcopy(patched))(x)
            assert_same_function(patched(x), expected)
