"""Programs of single blocks: when they are repeated, and that no change goes unnoticed."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import effnet_kernels as ek
from effnet_kernels import native
from effnet_kernels.modules.program import FORMS, KEPT_ATTRIBUTE
from tests.models import images, randomize
from tests.programs import block, make, replayed, the_long_way, warm, x

__all__ = ["block", "replayed", "x"]

pytestmark = pytest.mark.skipif(not ek.backends()["cpu"][0], reason="the native CPU library is not built")


@torch.inference_mode()
def test_the_second_call_is_a_repetition(block, x, replayed):
    first = block(x)
    assert not replayed
    second = block(x)
    assert len(replayed) == 1
    assert torch.equal(first, second)
    assert second.stride() == first.stride()
    other = images(2, 9, 8, seed=5).to(memory_format=torch.channels_last)
    assert torch.equal(block(other), the_long_way(block, other))
    assert len(replayed) == 2


class Doubled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def _own_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


def _set(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)


CHANGES = {
    "parameter": lambda m: _set(m.conv_pw, weight=nn.Parameter(m.conv_pw.weight * 2)),
    "_parameters": lambda m: m.conv_pw._parameters.update(weight=nn.Parameter(m.conv_pw.weight * 2)),
    "buffer": lambda m: _set(m.bn2, running_var=m.bn2.running_var * 4),
    "child": lambda m: _set(m, bn1=randomize(copy.deepcopy(m.bn1), seed=9)),
    "class": lambda m: _set(m.conv_pwl, __class__=Doubled),
    "forward": lambda m: _own_forward(m.conv_dw),
    "hook": lambda m: m.conv_dw.register_forward_hook(lambda module, inputs, output: output * 2),
    "weight": lambda m: m.conv_dw.weight.mul_(2),
    "weight.data": lambda m: _set(m.conv_dw.weight, data=m.conv_dw.weight.data * 2),
    "norm": lambda m: m.bn3.weight.mul_(2),
    "norm.data": lambda m: _set(m.bn3.weight, data=m.bn3.weight.data * 2),
    "se": lambda m: m.se.conv_expand.weight.mul_(-3),
    "epsilon": lambda m: _set(m.bn2, eps=3.0),
    "stride": lambda m: (_set(m.conv_dw, stride=(2, 2)), _set(m, has_skip=False)),
    "activation": lambda m: _set(m.bn1, act=nn.ReLU()),
    "padding": lambda m: (_set(m.conv_dw, padding=(0, 0)), _set(m, has_skip=False)),
    "shortcut": lambda m: _set(m, has_skip=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change, block, x):
    """Whichever of several programs is called first: what they share is right for all, or for none."""
    inputs = [x, x[:1], images(2, 10, 8)]
    before, *_ = [warm(block, i)[0] for i in inputs]
    held = [p.data for p in block.parameters()]  # noqa: F841 (the old memory stays)
    with torch.no_grad():
        CHANGES[change](block)
    for i in inputs[1:]:
        with torch.inference_mode():
            assert all(torch.equal(block(i), the_long_way(block, i)) for _ in range(2))
    with torch.inference_mode():
        got = block(x)
    expected = the_long_way(block, x)
    assert torch.equal(got, expected)
    assert got.shape != before.shape or not torch.equal(got, before), "the change changed nothing"


@torch.inference_mode()
def test_what_decides_about_the_algorithm_is_noticed():
    """Stride and weights do, for dense 3x3 windows; what was packed for one is of no use for the other."""
    block = randomize(ek.FusedMBConv(24, 24, exp_ratio=2.0, noskip=True, act_layer=nn.SiLU)).eval()
    x = images(2, 18, 24).to(memory_format=torch.channels_last)
    weight = block.conv_exp.weight.clone()
    for stride, taps in ((1, 3), (2, 3), (1, 3), (1, 1), (2, 1), (1, 1), (1, 3)):
        block.conv_exp.stride = (stride, stride)
        block.conv_exp.weight.zero_()[..., :taps, :taps] = weight[..., :taps, :taps]
        for _ in range(2):
            assert torch.equal(block(x), the_long_way(block, x)), (stride, taps)


def test_training_mode_is_noticed(block, x):
    warm(block, x)
    reference = copy.deepcopy(block)
    for module in (block, reference):
        module.train()
    with torch.no_grad():
        block(x)
        reference(x)
    assert torch.equal(block.bn1.running_mean, reference.bn1.running_mean)
    assert not torch.equal(block.bn1.running_mean, make().bn1.running_mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_dtype_is_noticed(dtype, block, x):
    warm(block, x)
    block.to(dtype)
    with torch.inference_mode():
        assert torch.equal(block(x.to(dtype)), the_long_way(block, x.to(dtype)))


@pytest.mark.parametrize("shape", [(2, 8, 9, 10), (1, 8, 9, 9), (2, 8, 10, 9)], ids=str)
def test_a_shape_is_noticed(shape, block, x, replayed):
    warm(block, x)
    other = torch.randn(shape).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        replayed.clear()
        assert torch.equal(block(other), the_long_way(block, other))
        assert not replayed
        for _ in range(3):
            block(other)
        assert len(replayed) == 3  # the new shape is kept in turn


def test_inputs_may_alternate(block, x, replayed):
    """A server's batches: each form of input is kept on its own, up to a number, the newest ones."""
    inputs = [x, x[:1], images(2, 10, 8).to(memory_format=torch.channels_last), torch.cat([x, x])]
    with torch.inference_mode():
        expected = [the_long_way(block, i) for i in inputs]
        for i in inputs:
            block(i)
        assert not replayed
        for _ in range(2):
            for i, y in zip(inputs, expected, strict=True):
                assert torch.equal(block(i), y)
        assert len(replayed) == 8
        for shared in (lambda p: p.state, lambda p: p.calls[0].packed):
            assert len({id(shared(program)) for program in replayed}) == 1
        for n in range(2, 9):
            block(images(n + 4, 9, 8))
        block(x)
    assert len(replayed) == 8
    assert len(vars(block)[KEPT_ATTRIBUTE].programs) == FORMS


def test_other_memory_is_noticed(block, x, replayed):
    before = warm(block, x)[0]
    replayed.clear()
    with torch.inference_mode():
        assert torch.equal(block(x.contiguous()), before)
        assert not replayed
        assert torch.equal(block(x.contiguous()), before)
    assert len(replayed) == 1


def test_a_choice_of_backend_is_noticed(block, x, replayed, monkeypatch):
    warm(block, x)
    replayed.clear()
    with torch.inference_mode():
        with ek.use_backend("reference"):
            block(x)
        monkeypatch.setenv("EFFNET_KERNELS_BACKEND", "reference")
        block(x)
    assert not replayed


def test_gradients_take_the_long_way(block, x, replayed):
    warm(block, x)
    replayed.clear()
    block(x).sum().backward()
    assert block.conv_pw.weight.grad is not None
    assert not replayed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_has_programs_of_its_own(dtype, x, replayed):
    """What is packed is the cast weight; what is watched is the weight."""
    block = randomize(ek.MBConv(8, 16, exp_ratio=4.0, se_layer=ek.SqueezeExcite, act_layer=nn.SiLU)).eval()
    plain = warm(block, x)[1]
    replayed.clear()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        first = block(x)
        assert not replayed
        assert torch.equal(block(x), first)
        assert first.dtype == dtype
        assert len(replayed) == 1
        block.conv_pw.weight.data[0, 0] += 1
        assert torch.equal(block(x), copy.deepcopy(block)(x))
        assert len(replayed) == 1
        block.conv_pw.weight.data[0, 0] -= 1
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_instruction_set_is_noticed(dtype, block, x, replayed):
    block, x = block.to(dtype), x.to(dtype)
    warm(block, x[:1])
    before = warm(block, x)[0]
    chosen = native.instruction_set()
    native.set_instruction_set("generic")
    replayed.clear()
    try:
        with torch.inference_mode():
            close = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
            torch.testing.assert_close(block(x), before, **close)
            torch.testing.assert_close(block(x[:1]), before[:1], **close)
        assert not replayed
    finally:
        native.set_instruction_set(chosen)


def test_weights_without_versions(x, replayed):
    with torch.inference_mode():
        block = make()
        warm(block, x)
        assert len(replayed) == 1
        block.conv_pw.weight.mul_(2)
        assert torch.equal(block(x), the_long_way(block, x))
    assert len(replayed) == 1


def test_a_hook_elsewhere_changes_nothing(block, x, replayed):
    warm(block, x)
    replayed.clear()
    nn.Linear(2, 2).register_forward_hook(lambda *_: None)
    with torch.inference_mode():
        block(x)
        block(x)
    assert len(replayed) == 2


def test_what_is_kept_dies_with_its_block(x):
    block = make()
    warm(block, x)
    (program,) = vars(block)[KEPT_ATTRIBUTE].programs.values()
    gone = [weakref.ref(t) for t in (program, program.table, block.conv_pw.weight, *program.kept)]
    gc.disable()  # there is no cycle
    try:
        del block, program
        assert not any(ref() is not None for ref in gone)
    finally:
        gc.enable()


def test_copies_keep_for_themselves(block, x):
    warm(block, x)
    for clone in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert not vars(clone)[KEPT_ATTRIBUTE].programs
    twin = copy.copy(block)  # with the same children, and an attribute of its own
    twin.has_skip = False
    for module in (twin, block, twin):
        with torch.inference_mode():
            assert torch.equal(module(x), the_long_way(module, x))


def test_threads_share_what_is_kept(block, x):
    expected = warm(block, x)[0]
    wrong = []

    def run():
        with torch.inference_mode():
            wrong.extend(i for i in range(50) if not torch.equal(block(x), expected))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


WRITERS = {
    "data": lambda m, state: setattr(m.conv_pw.weight, "data", state["conv_pw.weight"].clone()),
    "parameter": lambda m, state: setattr(m.conv_pw, "weight", nn.Parameter(state["conv_pw.weight"].clone())),
    "load_state_dict": lambda m, state: m.conv_pw.load_state_dict({"weight": state["conv_pw.weight"]}, assign=True),
}


@pytest.mark.parametrize("write", WRITERS)
def test_a_writer_among_threads(write, x):
    """Each result is of the old or of the new weights, whenever they are exchanged."""
    block = make()
    states = [{name: t.clone() for name, t in block.state_dict().items()} for _ in range(2)]
    states[1]["conv_pw.weight"].mul_(-1.5)
    expected = []
    for state in states:
        WRITERS[write](block, state)
        expected += warm(block, x)[:1]
    assert not torch.equal(*expected)
    wrong, seen, done = [], set(), threading.Event()

    def read():
        with torch.inference_mode():
            while not done.is_set():
                y = block(x)
                which = [torch.equal(y, e) for e in expected]
                wrong.append(y) if not any(which) else seen.add(which.index(True))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    with torch.no_grad():
        for i in range(1500):
            WRITERS[write](block, states[i % 2])
            if i % 5 == 0:
                done.wait(0.001)
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert seen == {0, 1}


def test_what_is_no_program_is_tried_again(block, x, replayed):
    """After more and more calls, as it may become one."""
    with torch.inference_mode():
        with ek.use_backend("reference"):
            for _ in range(10):
                block(x)
        for _ in range(20):
            block(x)
    assert len(replayed) > 5
