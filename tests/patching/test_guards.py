"""Where a fused call would be noticed or wrong, the stock forward runs: one test per guard."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import effnet_kernels as ek
from effnet_kernels.modules import fusing
from tests.models import timm_model
from tests.patching.conftest import build


BLOCKS = {"mbconv", "fused_mbconv", "train"}


@pytest.fixture
def fused(monkeypatch):
    """The names of the ops called so far, with ``train`` for a block with gradients; clear it and look again."""
    calls = []
    train = fusing.train
    monkeypatch.setattr(fusing, "train", lambda *a: (calls.append("train"), train(*a))[1])
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

    weight = patched.conv_pwl.weight
    patched.conv_pwl.weight = nn.Parameter(weight.detach().as_subclass(Special))
    fused.clear()
    patched(sample(patched))
    assert not BLOCKS & set(fused)


def test_scripting_and_tracing(fused):
    """TorchScript compiles the stock source; a trace records stock operators."""
    for name in ("test_efficientnet", "torchvision"):
        model = build(name)
        x = torch.randn(1, 3, 40, 40)
        ek.patch(model, backend="reference")
        stock = ek.unpatch(copy.deepcopy(model))
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
    graph = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert torch.equal(graph(x), ek.unpatch(model)(x))
    assert not fused


def test_function_transforms(patched, fused):
    """vmap over an ensemble's weights, and forward-mode differentiation, have no rule for the ops."""
    x = sample(patched)
    state = {k: torch.stack([v, v]) for k, v in patched.state_dict().items() if v.is_floating_point()}

    def call(state):
        return torch.func.functional_call(patched, state, (x,))

    stock = ek.unpatch(copy.deepcopy(patched))
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(call)(state)[1], stock(x), rtol=1e-4, atol=1e-5)
    fused.clear()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(patched(dual)).tangent is not None
    assert not BLOCKS & set(fused)


def test_nothing_to_gain(patched, fused):
    """Without a kernel for it, as in float16 on a CPU, automatic choice leaves the block alone."""
    ek.patch(patched)
    assert_stock(patched.double(), fused, sample(patched).double())


def test_autocast_keeps_the_dtype_of_a_wide_shortcut(patched):
    x = sample(patched)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = patched(x)
        assert y.dtype == ek.unpatch(patched)(x).dtype
