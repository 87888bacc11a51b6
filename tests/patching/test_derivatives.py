"""What people differentiate: in eval mode, twice, in batches, eval and training in one; as stock, or better."""

import copy

import pytest
import torch
from torch import nn

import effnet_kernels as ek
from effnet_kernels.modules import fusing
from tests.criterion import assert_gradients, of_sums, rms
from tests.models import BACKENDS, images
from tests.patching.conftest import build
from tests.thinning import daily, in_turns

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])


def three(name, backend, training=False):
    """Stock, patched, and stock in float64."""
    model = build(name).train(training)
    for m in model.modules():
        if isinstance(m, nn.Dropout) or type(m).__name__ in ("DropPath", "StochasticDepth"):
            m.eval()
    return model, ek.patch(copy.deepcopy(model), backend=backend), copy.deepcopy(model).double()


NOISE = of_sums(torch.float32, 2 * 37 * 37)  # the longest sums are over all pixels


def on(model, function, *inputs):
    dtype = next(model.parameters()).dtype
    result = function(model, *(x.to(dtype) for x in inputs))
    return result if isinstance(result, list) else [result]


def hvp(model, x, v):
    return torch.autograd.functional.hvp(lambda t: model(t).logsumexp(1).sum(), x, v)[1]


def penalty(model, x):
    """Gradients of a loss with a gradient penalty in it."""
    x = x.clone().requires_grad_()
    loss = model(x).square().mean()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return [*torch.autograd.grad(loss + grad.square().sum(), [*model.parameters()])]


def jacobian(model, x):
    return torch.autograd.functional.jacobian(lambda t: model(t)[:, :3], x, vectorize=True)


def hessian(model, x):
    """Of one parameter, all rows at once."""
    bias = next(p for name, p in model.named_parameters() if name.endswith("bias"))
    (grad,) = torch.autograd.grad(model(x).square().sum(), bias, create_graph=True)
    return torch.autograd.grad(grad, bias, torch.eye(len(bias), dtype=x.dtype), is_grads_batched=True)[0]


@in_turns("function, training, backend", [hvp, penalty, jacobian, hessian], [False, True], BACKENDS)
@pytest.mark.parametrize("name", daily(["test_efficientnet", "torchvision"], ["test_efficientnet"]))
def test_higher_derivatives(name, function, training, backend):
    x = images(2, 37)
    inputs = (x, images(2, 37, seed=7)) if function is hvp else (x,)
    stock, patched, exact = (on(m, function, *inputs) for m in three(name, backend, training))
    assert any(rms(e) > 0 for e in exact)
    assert_gradients(patched, stock, exact, noise=NOISE)


@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050", "torchvision"])
def test_eval_mode_with_gradients_runs_forward_once(name, backend, monkeypatch):
    """Backward takes what forward kept; it does not evaluate the block again."""
    stock, patched, exact = three(name, backend)
    calls = []
    train = fusing.conv_block
    monkeypatch.setattr(fusing, "conv_block", lambda *a, **k: (calls.append(1), train(*a, **k))[1])
    gradients = []
    for m in (patched, stock, exact):
        x = images(2, 37).to(next(m.parameters()).dtype).requires_grad_()
        y = m(x).square().sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y.backward()
        if m is patched:
            assert not [e for e in profile.events() if e.name in ("aten::conv2d", "aten::batch_norm")]
        gradients.append([x.grad, *(p.grad for p in m.parameters())])
    assert len(calls) == len(ek.report(patched).patched)
    assert_gradients(*gradients, noise=NOISE)


@pytest.mark.parametrize("wanted", ["input", "last block", "gammas"])
def test_only_some_gradients_in_eval_mode(wanted, backend):
    gradients = []
    for m in three("test_efficientnet", backend):
        m.requires_grad_(False)
        x = images(2, 37).to(next(m.parameters()).dtype)
        leaves = {
            "input": [x],
            "last block": [*m.blocks[-1].parameters()],
            "gammas": [n.weight for n in m.modules() if isinstance(n, nn.BatchNorm2d)],
        }[wanted]
        for leaf in leaves:
            leaf.requires_grad_()
        gradients.append(torch.autograd.grad(m(x).square().sum(), leaves))
    patched, stock, exact = gradients[1], gradients[0], gradients[2]
    assert_gradients(patched, stock, exact, noise=NOISE)


@pytest.mark.parametrize("order", [(False, True), (True, False), (False, True, False)], ids=str)
def test_eval_and_training_in_one_backward(order, backend):
    """The gradient of each forward by the statistics that it used: their sum is that of backward after each."""
    _, patched, _ = three("test_efficientnet", backend)
    twin = copy.deepcopy(patched)
    x = images(2, 37)
    sum(patched.train(training)(x).square().sum() for training in order).backward()
    for training in order:
        twin.train(training)(x).square().sum().backward()
    for p, q in zip(patched.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_running_statistics_move_without_a_new_version(backend):
    """As torch's do: what somebody computed from them before can still be differentiated."""
    _, patched, _ = three("test_efficientnet", backend, training=True)
    norm = patched.blocks[1][0].bn1
    versions = norm.running_mean._version, norm.running_var._version
    before = norm.running_var.clone()
    patched(images(2, 37))
    assert not torch.equal(norm.running_var, before)
    assert (norm.running_mean._version, norm.running_var._version) == versions


def _share(model, names):
    first, second = (model.get_submodule(name) for name in ("blocks.3.0.bn1", "blocks.3.0.bn2"))
    for name in names:
        setattr(second, name, getattr(first, name))


@pytest.mark.parametrize("names", [["weight"], ["weight", "bias"], ["running_mean", "running_var"]], ids=str)
def test_norms_that_share(names, backend):
    """A gamma, all parameters, or even the statistics: each module's own statistics move, in order."""
    model, patched, exact = three("test_efficientnet", backend)
    for m in (model, patched, exact):
        _share(m, names)
        m.train()(images(2, 37).to(next(m.parameters()).dtype)).square().sum().backward()
    assert_gradients(*([*(b.float() for b in m.buffers())] for m in (patched, model, exact)), noise=NOISE)
    assert_gradients(*([p.grad for p in m.parameters()] for m in (patched, model, exact)), noise=NOISE)


def test_a_norm_in_two_places(backend):
    model = build("test_efficientnet")
    model.blocks[3][0].bn2 = model.blocks[3][0].bn1
    patched = ek.patch(copy.deepcopy(model), backend=backend)
    for m in (model, patched):
        m.train()(images(2, 37)).sum().backward()
    torch.testing.assert_close(dict(patched.named_buffers()), dict(model.named_buffers()), rtol=1e-4, atol=1e-5)


def test_statistics_that_are_not_tracked_stay(backend):
    model = build("test_efficientnet").train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats = False
    before = copy.deepcopy(dict(model.named_buffers()))
    patched = ek.patch(copy.deepcopy(model), backend=backend)
    torch.testing.assert_close(patched(images(2, 37)), model(images(2, 37)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(patched.named_buffers()), before, rtol=0, atol=0)


@MODES
def test_saved_on_the_cpu_without_strides(training, backend):
    class Dense(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self):
            super().__init__(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t)

    gradients = []
    for model in three("test_efficientnet", backend, training):
        x = images(2, 37).to(next(model.parameters()).dtype)
        with Dense():  # torch's own convolutions may round by the strides, too
            y = model(x).square().sum()
        y.backward()
        gradients.append([p.grad for p in model.parameters()])
    stock, patched, exact = gradients
    assert_gradients(patched, stock, exact, noise=NOISE)
