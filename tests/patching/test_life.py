"""The life of a patched model: what patching must keep, and every way of using the model afterwards."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import effnet_kernels as ek
from effnet_kernels.benchmarking.agreement import exact_output
from tests.criterion import GRADIENTS, assert_as_accurate, assert_same_function, measuring
from tests.models import BACKENDS, images, in_two_threads, timm_model
from tests.patching.conftest import NAMES, build
from tests.thinning import daily


def assert_accurate(stock: nn.Module, y: Tensor, x: Tensor) -> None:
    """y is what ``stock`` gives for x, with at most twice its error."""
    with torch.no_grad(), measuring():
        assert_as_accurate(y, stock(x), exact_output(stock, x))


def test_state_is_kept(model, x, backend):
    before = copy.deepcopy(model)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    classes = {name: type(m) for name, m in model.named_modules()}
    assert ek.patch(model, backend=backend) is model
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert all(isinstance(m, classes[name]) for name, m in model.named_modules())
    model.load_state_dict(before.state_dict(), strict=True)
    before.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert_accurate(before, model(x), x)


@pytest.mark.parametrize("model", daily(NAMES, NAMES[:1]), indirect=True)
def test_patched_outputs_come_from_the_ops(model, x):
    """Every comparison with stock would also pass if nothing were ever fused."""
    ek.patch(model, backend="reference")
    calls = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with calls:
        torch.compile(model, backend="eager")(x)  # the ops go through the dispatcher
    called = [event.name for event in calls.events() if event.name.startswith("effnet_kernels::")]
    assert len(called) >= len(ek.report(model).patched)
    assert not any(event.name == "aten::silu_" for event in calls.events())


def test_patch_twice(model, x, backend):
    with torch.no_grad():
        y = ek.patch(model, backend=backend)(x)
        classes = [type(m) for m in model.modules()]
        ek.patch(model, backend=backend)
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(model(x), y)


def test_unpatch_is_the_inverse(model, x, backend):
    classes = [type(m) for m in model.modules()]
    state = [dict(m.__dict__) for m in model.modules()]
    with torch.no_grad():
        y = model(x)
        ek.patch(model, backend=backend)(x)
        assert ek.unpatch(model) is model
        assert [type(m) for m in model.modules()] == classes
        assert [set(m.__dict__) for m in model.modules()] == [set(d) for d in state]
        assert torch.equal(model(x), y)
        ek.unpatch(model)
        assert torch.equal(model(x), y)


def test_the_backend_is_remembered_and_replaced(x):
    model = build("test_efficientnet")
    ek.patch(model, backend="reference")
    assert all("[reference]" in detail for _, _, detail in ek.report(copy.deepcopy(model)).patched)
    ek.patch(model)
    assert not any("[" in detail for _, _, detail in ek.report(model).patched)
    assert list(ek.unpatch(model).state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(model, x, backend, clone):
    with torch.no_grad():
        y = ek.patch(model, backend=backend)(x)
        twin = clone(model)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        for p in model.parameters():
            p.zero_()
        assert torch.equal(twin(x), y)


def test_a_pickle_with_the_name_that_programs_had(x):
    """Models that ran were saved with it before the class was renamed."""
    model = ek.patch(build("test_efficientnet"))
    with torch.inference_mode():
        expected = model(x)
    saved = pickle.dumps(model, protocol=0)
    if b"Programs" not in saved:
        pytest.skip("nothing is kept here: the native CPU library is not built")
    with torch.inference_mode():
        assert torch.equal(pickle.loads(saved.replace(b"program\nPrograms\n", b"program\nKept\n"))(x), expected)


def test_pickle_in_a_fresh_process(x, tmp_path):
    samples = []
    for name in NAMES:
        model = ek.patch(build(name), backend=BACKENDS[-1])
        with torch.no_grad():
            samples.append((model, model(x), [type(m) for m in model.modules()]))
    torch.save((samples, x), tmp_path / "models.pt")
    code = f"""
import torch
samples, x = torch.load({str(tmp_path / "models.pt")!r}, weights_only=False)
import effnet_kernels
for model, y, classes in samples:
    assert [type(m) for m in model.modules()] == classes
    assert effnet_kernels.report(model).patched
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_averaged_copy(x, backend):
    """torch's EMA wrapper deep-copies and then updates in place."""
    model = ek.patch(build("test_efficientnet"), backend=backend)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    average.update_parameters(model)
    stock = ek.unpatch(copy.deepcopy(average.module)).eval()
    with torch.no_grad():
        assert_accurate(stock, average.eval()(x), x)


def test_changes_in_place_are_seen(model, x, backend):
    """Weights, statistics, epsilon, stride and activation changed after the first forward."""
    ek.patch(model, backend=backend)
    with torch.no_grad():
        first = model(x)
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(1.05)
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.add_(0.05)
                m.eps = 0.01
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        convs[1].stride = (1, 1)
        for m in model.modules():
            for name, child in list(m.named_children()):
                if isinstance(child, nn.SiLU):
                    setattr(m, name, nn.Hardswish())
        y = model(x)
    assert not torch.allclose(first, y)
    assert_accurate(ek.unpatch(model), y, x)


def test_training_is_as_accurate_as_stock(model, x, backend):
    """Output, gradients and running statistics, with stochastic depth and dropout on and the same random stream."""
    twin = ek.patch(copy.deepcopy(model), backend=backend)
    results = []
    for m in (copy.deepcopy(model).double(), model, twin):
        torch.manual_seed(5)
        y = m.train()(x.to(next(m.parameters()).dtype))
        y.square().sum().backward()
        results.append([torch.cat([t.double().flatten() for t in ts]) for ts in ([y], _gradients(m), m.buffers())])
    for exact, stock, patched in zip(*results, strict=True):
        assert_as_accurate(patched, stock, exact, GRADIENTS * torch.finfo(torch.float32).eps)


def _gradients(model):
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", ["tf_efficientnetv2_b0", "torchvision"])
def test_stochastic_depth_with_frozen_norms(name, backend):
    """Training with BatchNorm in eval mode is fused, and drops the same samples as stock."""
    stock = build(name, **({"stochastic_depth_prob": 0.5} if name == "torchvision" else {"drop_path_rate": 0.5}))
    x = torch.randn(6, 3, 37, 37, generator=torch.Generator().manual_seed(0))
    patched = ek.patch(copy.deepcopy(stock), backend=backend)
    outputs = []
    for m in (stock, patched):
        m.train()
        for child in m.modules():
            if isinstance(child, (nn.BatchNorm2d, nn.Dropout)):
                child.eval()
        torch.manual_seed(9)
        outputs.append(m(x))
    assert_same_function(outputs[1], outputs[0])
    assert not torch.equal(outputs[1], outputs[0])  # it was fused
    assert not torch.allclose(outputs[0], stock.eval()(x), rtol=1e-2, atol=1e-2)  # and it did drop


def test_gradients_in_eval(model, x, backend):
    twin = ek.patch(copy.deepcopy(model), backend=backend)
    grads = []
    for m in (copy.deepcopy(model).double(), model, twin):
        m(x.to(next(m.parameters()).dtype)).square().sum().backward()
        grads.append(torch.cat([p.grad.double().flatten() for p in m.parameters()]))
    exact, stock, patched = grads
    assert_as_accurate(patched, stock, exact, GRADIENTS * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("change", ["half", "bfloat16", "channels_last", "double"])
def test_conversions_after_patching(model, x, change):
    """Whatever the automatic choice of backend runs it on: the result is of stock's dtype and quality."""
    exact = exact_output(model, x)

    def convert(m, x):
        if change == "channels_last":
            return m.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        return getattr(m, change)(), getattr(x, change)()

    with torch.no_grad():
        stock_model, cx = convert(copy.deepcopy(model), x)
        with measuring():
            stock = stock_model(cx)
        y = convert(ek.patch(model), x)[0](cx)
    assert y.dtype == stock.dtype
    assert_as_accurate(y, stock, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(model, x, dtype, backend):
    exact = exact_output(model, x)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        with measuring():
            stock = model(x)
        y = ek.patch(model, backend=backend)(x)
    assert y.dtype == stock.dtype == dtype
    assert_as_accurate(y, stock, exact)


def test_two_threads_use_one_model(model, x, backend):
    ek.patch(model, backend=backend)
    inputs = [x, x.flip(3)]
    with torch.no_grad():
        expected = [model(i) for i in inputs]
    wrong = []

    def work(i):
        with torch.no_grad():
            wrong.extend(n for n in range(5) if not torch.equal(model(inputs[i]), expected[i]))

    in_two_threads(work)
    assert not wrong


def test_features_only(x, backend):
    for name in ("test_efficientnet", "mobilenetv3_small_050"):
        stock = timm_model(name, features_only=True)
        patched = ek.patch(copy.deepcopy(stock), backend=backend)
        assert any("conv_stem" in row[0] for row in ek.report(patched).patched)
        with torch.no_grad():
            for y, s in zip(patched(x), stock(x), strict=True):
                assert_same_function(y, s)


def test_features_from_inside_a_block(x):
    """These features come from hooks on children: those blocks must run stock, the others must not."""
    stock = timm_model("test_efficientnet", features_only=True, feature_location="expansion")
    patched = ek.patch(copy.deepcopy(stock), backend="reference")
    assert ek.report(patched).patched
    assert any("hooks" in reason for _, _, reason in ek.report(patched).skipped)
    with torch.no_grad():
        for y, s in zip(patched(x), stock(x), strict=True):
            assert_same_function(y, s)


@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050"])
def test_timm_methods(name, x, backend):
    """forward_intermediates, forward_features, forward_head, reset_classifier, pruning, checkpointing."""
    stock = build(name)
    patched = ek.patch(copy.deepcopy(stock), backend=backend)

    def close(call):
        with torch.no_grad():
            assert_same_function(call(patched), call(stock))

    close(lambda m: m.forward_intermediates(x))
    close(lambda m: m.forward_features(x))
    close(lambda m: m.forward_head(m.forward_features(x), pre_logits=True))
    for m in (stock, patched):
        m.set_grad_checkpointing(True)
    grads = []
    for m in (stock, patched):
        m(x).sum().backward()
        grads.append(m.conv_stem.weight.grad)
        m.set_grad_checkpointing(False)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    for m in (stock, patched):
        torch.manual_seed(0)
        m.reset_classifier(7, "avg" if name == "test_efficientnet" else None)
    close(lambda m: m(x))
    if name == "test_efficientnet":
        for pool in ("max", "catavgmax", "fast", ""):
            for m in (stock, patched):
                torch.manual_seed(0)
                m.reset_classifier(0, pool)
            close(lambda m: m(x))
    for m in (stock, patched):
        m.prune_intermediate_layers([1])
    close(lambda m: m.forward_intermediates(x, intermediates_only=True))


def test_state_dict_through_a_file(model, x, backend):
    """Weights saved by a patched model load into a stock one of the same kind and the other way round."""
    stock = copy.deepcopy(model)
    ek.patch(model, backend=backend)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    stock.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    with torch.no_grad():
        assert_accurate(stock, model(x), x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_the_meta_device(model, training):
    """Shapes without data, as deferred initialisation and counters of operations ask for them."""
    expected = model.train(training)(images(2, 37))
    for backend in ("auto", *BACKENDS):
        patched = ek.patch(copy.deepcopy(model), backend=backend).to("meta")
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y = patched(torch.empty(2, 3, 37, 37, device="meta"))
            assert (y.shape, y.dtype, y.device.type) == (expected.shape, expected.dtype, "meta")


@pytest.mark.parametrize(
    "block", [ek.MBConv(8, 8), ek.FusedMBConv(8, 8), ek.SqueezeExcite(8), ek.DepthwiseConvBNAct(8)]
)
def test_single_modules_on_the_meta_device(block):
    x = torch.empty(2, 8, 9, 9, device="meta")
    for training in (False, True):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert copy.deepcopy(block).to("meta").train(training)(x).shape == x.shape


def test_another_default_device(model, x, backend):
    """What is set with ``set_default_device`` is for tensors that people make, not for a model that is elsewhere."""
    stock = copy.deepcopy(model)
    ek.patch(model, backend=backend)
    torch.set_default_device("meta")
    try:
        with torch.no_grad():
            outputs = [model(x) for _ in range(5)]
        model.train()(x).square().sum().backward()
    finally:
        torch.set_default_device(None)
    with torch.no_grad():
        for y in outputs:
            assert_same_function(y, stock(x))
    assert all(p.grad is not None and not p.grad.is_meta for p in model.parameters())
