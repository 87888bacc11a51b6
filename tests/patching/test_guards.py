"""Where a fused call would be noticed or wrong, the stock forward runs: one test per guard."""

import copy
import functools
import importlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import effnet_kernels as ek
from effnet_kernels.modules import fusing
from tests.criterion import assert_same_function
from tests.models import BACKENDS, images, timm_model
from tests.patching.conftest import build
from tests.thinning import in_turns

BLOCKS = {"mbconv", "fused_mbconv", "train"}


@pytest.fixture
def fused(monkeypatch):
    """The names of the ops called so far, with ``train`` for a block with gradients; clear it and look again."""
    calls = []
    train = fusing.conv_block
    monkeypatch.setattr(fusing, "conv_block", lambda *a, **k: (calls.append("train"), train(*a, **k))[1])
    for name in ("mbconv", "fused_mbconv", "pointwise_conv_bn_act", "depthwise_conv_bn_act", "squeeze_excite"):
        op = getattr(fusing.F, name)
        monkeypatch.setattr(fusing.F, name, lambda *a, name=name, op=op, **k: (calls.append(name), op(*a, **k))[1])
    return calls


def block(kind):
    """One patched block with a shortcut."""
    model = timm_model("efficientnet_b0" if kind == "mbconv" else "tf_efficientnetv2_b0")
    return ek.patch(model.blocks[1][1], backend="reference")


@pytest.fixture(params=["mbconv", "fused_mbconv"])
def patched(request):
    return block(request.param)


def sample(patched):
    channels = next(patched.children()).in_channels
    return torch.randn(2, channels, 9, 9, generator=torch.Generator().manual_seed(0))


def assert_stock(patched, fused, x=None):
    """This call runs the stock forward; an SE inside may still run as an op of its own."""
    x = sample(patched) if x is None else x
    fused.clear()
    with torch.no_grad():
        y = patched(x)
        assert not BLOCKS & set(fused)
        torch.testing.assert_close(y, ek.unpatch(patched)(x), rtol=1e-5, atol=1e-5)
    ek.patch(patched, backend="reference")


def test_without_a_reason_it_is_fused(patched, fused):
    with torch.no_grad():
        patched(sample(patched))
    assert len(fused) == 1


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
    "forward_pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
    "full_backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
    "full_backward_pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_any_child(patched, fused, kind):
    """A hook on a child, a grandchild, ... is called as on the stock block; once removed, the block is fused again."""
    for m in patched.modules():
        if isinstance(m, nn.SiLU):
            m.inplace = False  # stock itself allows no backward hook before an activation in place
    for name, child in patched.named_modules():
        if not name:
            continue
        seen = []
        handle = HOOKS[kind](child, seen)
        fused.clear()
        x = sample(patched).requires_grad_()
        patched(x).sum().backward()
        assert seen, name
        assert not BLOCKS & set(fused), name
        assert any("hooks" in reason for _, _, reason in ek.report(patched).skipped)
        handle.remove()
    fused.clear()
    patched(sample(patched))
    assert len(fused) == 1


def test_hooks_on_the_block_itself_need_no_fallback(patched, fused):
    seen = []
    patched.register_forward_hook(lambda *_: seen.append(1))
    patched(sample(patched))
    assert seen
    assert len(fused) == 1


def test_global_hooks(patched, fused):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        patched(sample(patched))
    finally:
        handle.remove()
    assert next(patched.children()) in seen
    assert not BLOCKS & set(fused)


def test_forward_on_the_instance(patched, fused):
    child = next(patched.children())
    child.forward = lambda x: nn.Conv2d.forward(child, x) * 2
    assert_stock(patched, fused)


def circular(conv):
    return lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w, b, conv.stride, 0, (1, 1), conv.groups)


def test_conv_forward_on_the_instance(patched, fused):
    """How circular padding is put into networks."""
    for conv in patched.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            conv._conv_forward = circular(conv)
    assert_stock(patched, fused)
    assert any("forward of its own" in reason for *_, reason in ek.report(patched).skipped)


def _larger(function):
    @functools.wraps(function)
    def larger(*args, **kwargs):
        return function(*args, **kwargs) * 1.1

    return larger


def test_check_of_the_input_on_the_instance(fused):
    """A BatchNorm calls it, and it may have something to say."""
    model = ek.patch(build("torchvision"), backend="reference")

    def refuse(x):
        raise ValueError("mine")

    next(m for m in model.features[1].modules() if isinstance(m, nn.BatchNorm2d))._check_input_dim = refuse
    with torch.no_grad(), pytest.raises(ValueError, match="mine"):
        model(images(2, 37))


REPLACED = [
    (nn.Conv2d, "_conv_forward"),
    (torch, "batch_norm"),
    (torch.Tensor, "mean"),
    (torch.Tensor, "sigmoid"),
    (nn.Conv2d, "forward"),
    (nn.SiLU, "forward"),
    (nn.Module, "__call__"),
    (nn.Module, "_call_impl"),
    (F, "conv2d"),
    (F, "silu"),
    (F, "batch_norm"),
    ("timm.layers", "BatchNormAct2d", "forward"),
    ("timm.layers", "Conv2dSame", "forward"),
    ("timm.models._efficientnet_blocks", "SqueezeExcite", "forward"),
    ("timm.models._efficientnet_blocks", "InvertedResidual", "forward"),
    ("timm.models._efficientnet_blocks", "EdgeResidual", "forward"),
    (nn.Sequential, "forward"),
    ("timm.models.efficientnet", "EfficientNet", "forward_features"),
    ("timm.models.efficientnet", "EfficientNet", "forward"),
    ("torchvision.ops", "Conv2dNormActivation", "forward"),
    ("torchvision.models.efficientnet", "MBConv", "forward"),
    ("torchvision.models.efficientnet", "EfficientNet", "_forward_impl"),
    ("torchvision.ops", "StochasticDepth", "forward"),
]


@in_turns("name, where, backend", ["tf_efficientnetv2_b0", "torchvision"], REPLACED, BACKENDS)
def test_what_is_replaced_on_a_class_runs(name, where, backend, monkeypatch):
    """Also once calls are kept; and when it is put back, the fused forward runs again, to the bit."""
    *path, attribute = where
    owner = path[0] if len(path) == 1 else getattr(importlib.import_module(path[0]), path[1])
    model = build(name)
    stock, x = copy.deepcopy(model), images(2, 37)
    ek.patch(model, backend=backend)
    with torch.no_grad():
        kept = [model(x) for _ in range(4)][-1]
        for grad in (False, True):
            with monkeypatch.context() as patches, torch.set_grad_enabled(grad):
                patches.setattr(owner, attribute, _larger(getattr(owner, attribute)))
                got, expected = model(x), stock(x)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        assert torch.equal(model(x), kept)


@pytest.mark.parametrize("name", ["tf_efficientnetv2_b0", "torchvision"])
def test_what_was_replaced_before_the_first_import_runs(name):
    """The functions are told by the file that they are from, not by when they were first seen."""
    code = f"""if 1:
        import copy, torch
        from torch import nn
        import torchvision
        nn.SiLU.forward = lambda self, x: torch.relu(x) * 3
        torchvision.models.efficientnet.MBConv.forward = lambda self, x: self.block(x)
        from timm.models._efficientnet_blocks import InvertedResidual
        InvertedResidual.forward = lambda b, x: b.bn3(b.conv_pwl(b.bn2(b.conv_dw(b.bn1(b.conv_pw(x))))))
        import effnet_kernels
        from tests.models import images
        from tests.patching.conftest import build
        model = build({name!r})
        patched = effnet_kernels.patch(copy.deepcopy(model))
        with torch.no_grad():
            torch.testing.assert_close(patched(images(2, 37)), model(images(2, 37)), rtol=1e-3, atol=1e-3)
        assert any("has been replaced" in reason for *_, reason in effnet_kernels.report(patched).skipped)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def _child(model, name):
    parent, _, last = name.rpartition(".")
    return model.get_submodule(parent), last


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "path", ["conv_stem", "bn1.act", "blocks.3.0.conv_dw", "blocks.3.0.se", "blocks.3.0", "blocks.3"]
)
@pytest.mark.parametrize("kind", ["script", "trace", "loaded"])
def test_a_child_that_is_a_script_module(path, kind, backend, tmp_path):
    model = build("test_efficientnet")
    inputs = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    with torch.no_grad():
        expected = model(images(2, 37))
        handle.remove()
        child = model.get_submodule(path)
        new = torch.jit.script(child) if kind == "script" else torch.jit.trace(child, inputs[0])
    if kind == "loaded":
        torch.jit.save(new, tmp_path / "child.pt")
        new = torch.jit.load(tmp_path / "child.pt")
    for late in (False, True):
        patched = copy.deepcopy(model)
        if late:
            ek.patch(patched, backend=backend)
        setattr(*_child(patched, path), new)
        ek.patch(patched, backend=backend)
        with torch.no_grad():
            for _ in range(4):
                assert_same_function(patched(images(2, 37)), expected)
        assert len(ek.report(patched).patched) > 3
        ek.unpatch(patched)


CHANGES = {
    "parametrization": lambda b: nn.utils.parametrizations.weight_norm(b.conv_pwl),
    "weight_norm": lambda b: nn.utils.weight_norm(b.conv_pwl),
    "pruning": lambda b: prune.l1_unstructured(b.conv_pwl, "weight", 0.5),
    "group norm": lambda b: setattr(b, "bn1", nn.GroupNorm(4, b.bn1.num_features)),
    "norm without affine": lambda b: setattr(b, "bn1", nn.BatchNorm2d(b.bn1.num_features, affine=False).eval()),
    "norm without statistics": lambda b: setattr(
        b, "bn1", nn.BatchNorm2d(b.bn1.num_features, track_running_stats=False).eval()
    ),
    "activation": lambda b: setattr(b.bn1, "act", nn.GELU()),
    "activation subclass": lambda b: setattr(b.bn1, "act", type("MySiLU", (nn.SiLU,), {})()),
    "dropout": lambda b: setattr(b.bn1, "drop", nn.Dropout2d(0.1).eval()),
    "bias": lambda b: setattr(b.conv_pwl, "bias", nn.Parameter(torch.ones(b.conv_pwl.out_channels))),
    "anti-aliasing": lambda b: setattr(b, "aa", nn.AvgPool2d(3, 1, 1)),
    "attention": lambda b: setattr(b, "se", nn.Sigmoid()),
    "wrapped convolution": lambda b: setattr(b, "conv_pwl", nn.Sequential(b.conv_pwl)),
    "dilation": lambda b: [
        (setattr(c, "dilation", (2, 2)), setattr(c, "padding", (2 * c.padding[0], 2 * c.padding[1])))
        for c in b.modules()
        if isinstance(c, nn.Conv2d) and c.kernel_size != (1, 1)
    ],
    "reflect padding": lambda b: [
        setattr(b, name, _reflecting(c))
        for name, c in list(b.named_children())
        if isinstance(c, nn.Conv2d) and c.kernel_size != (1, 1)
    ],
}


def _reflecting(conv):
    new = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, groups=conv.groups, bias=False,
        padding_mode="reflect",
    )  # fmt: skip
    new.weight = conv.weight
    return new


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_no_op_covers(patched, fused, change):
    CHANGES[change](patched)
    assert_stock(patched, fused)
    assert any(ek.report(patched).skipped)


def test_sync_and_frozen_batch_norm(fused):
    timm = pytest.importorskip("timm")
    for convert in (timm.layers.convert_sync_batchnorm, timm.layers.freeze_batch_norm_2d):
        patched = convert(block("mbconv"))
        if convert is timm.layers.freeze_batch_norm_2d:
            assert_stock(patched, fused)
        assert not any(row[1] == "InvertedResidual" for row in ek.report(patched).patched)


def test_weight_subclass(patched, fused):
    class Special(torch.Tensor):
        pass

    patched.conv_pwl.weight = nn.Parameter(patched.conv_pwl.weight.detach().as_subclass(Special))
    fused.clear()
    patched(sample(patched))
    assert not BLOCKS & set(fused)


def test_scripting_and_tracing(fused):
    """TorchScript compiles the stock source; a trace records stock operators."""
    for name in ("test_efficientnet", "torchvision"):
        stock, x = build(name), torch.randn(1, 3, 40, 40)
        model = ek.patch(copy.deepcopy(stock), backend="reference")
        with torch.no_grad():
            scripted, traced = torch.jit.script(model), torch.jit.trace(model, x)
            fused.clear()
            torch.testing.assert_close(scripted(x), stock(x), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(traced(x), stock(x), rtol=1e-5, atol=1e-6)
        assert not fused
        assert "effnet_kernels::" not in str(traced.inlined_graph) + str(scripted.inlined_graph)


def test_symbolic_tracing(fused):
    model = ek.patch(build("mobilenetv3_small_050"), backend="reference")
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model)(x), ek.unpatch(model)(x))
    assert not fused


def test_function_transforms(patched, fused):
    """vmap over an ensemble's weights, and forward-mode differentiation, have no rule for the ops."""
    x = sample(patched)
    state = {k: torch.stack([v, v]) for k, v in patched.state_dict().items() if v.is_floating_point()}

    def call(state):
        return torch.func.functional_call(patched, state, (x,))

    stock = ek.unpatch(copy.deepcopy(patched))
    with torch.no_grad():
        assert_same_function(torch.func.vmap(call)(state)[1], stock(x))
    fused.clear()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(patched(dual)).tangent is not None
    assert not BLOCKS & set(fused)


def test_nothing_to_gain(patched, fused):
    """Without a kernel for it, as in float64 on a CPU, automatic choice leaves the block alone."""
    ek.patch(patched)
    assert_stock(patched.double(), fused, sample(patched).double())


@pytest.mark.skipif(not ek.backends()["cpu"][0], reason="the native CPU library is not built")
def test_float16_is_fused_on_a_cpu_but_not_where_gradients_are_wanted(patched, fused):
    """There no kernel trains in it: the stock forward runs, and nobody is told."""
    ek.patch(patched).half()
    stock = ek.unpatch(copy.deepcopy(patched))
    with torch.no_grad():
        patched(sample(patched).half())
    assert len(fused) == 1
    results = []
    for module in (patched, stock):
        for mode in (module.eval, module.train):
            mode()
            module.zero_grad()
            x = sample(patched).half().requires_grad_()
            y = module(x)
            y.float().square().mean().backward()
            parameters = [p.grad.clone() for p in module.parameters()]
            results.append([y, x.grad.clone(), *parameters, *map(torch.clone, module.buffers())])
    for got, expected in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert {*fused[1:]} <= {"train"}


def test_autocast_keeps_the_dtype_of_a_wide_shortcut(patched):
    x = sample(patched)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = patched(x)
        assert y.dtype == ek.unpatch(patched)(x).dtype
