"""patch, unpatch and report themselves: bad input, rollback, what the report says."""

import copy
import re

import pytest
import torch
from torch import nn

import effnet_kernels as ek
from effnet_kernels import dispatch
from effnet_kernels.patching import core
from tests.criterion import assert_same_function
from tests.models import BACKENDS, images, timm_model, torchvision_model
from tests.patching.conftest import NAMES, build
from tests.thinning import in_turns


@pytest.mark.parametrize("function", [ek.patch, ek.unpatch, ek.report])
@pytest.mark.parametrize("thing", [None, "efficientnet_b0", torch.zeros(1), nn.Linear], ids=str)
def test_not_a_module(function, thing):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got "):
        function(thing)


def test_nothing_to_patch():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    for function in (ek.patch, ek.report):
        with pytest.raises(ValueError, match="found none in Sequential"):
            function(model)
    assert ek.unpatch(model) is model


def test_bad_backend_leaves_the_model_alone(monkeypatch):
    model = build("test_efficientnet")
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"backend must be one of .*'tpu'"):
        ek.patch(model, backend="tpu")
    with pytest.raises(TypeError, match="backend must be a string"):
        ek.patch(model, backend=3)
    available = dispatch._AVAILABLE
    monkeypatch.setitem(available, "cpu", lambda: (False, "it was not built"))
    with pytest.raises(RuntimeError, match="'cpu' is not available: it was not built"):
        ek.patch(model, backend="cpu")
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("patched_before", [False, True])
def test_rollback(patched_before, monkeypatch):
    """An exception in the middle leaves classes and remembered backends as they were."""
    model = build("test_efficientnet")
    if patched_before:
        ek.patch(model, backend="reference")
    classes = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    original, count = core._set, 0

    def failing(*args):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(core, "_set", failing)
    with pytest.raises(KeyboardInterrupt):
        ek.patch(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes


def test_report_before_and_after():
    model = build("test_efficientnet")
    before = ek.report(model)
    assert not before.patched
    assert all("not patched" in reason for *_, reason in before.skipped)
    after = ek.report(ek.patch(model))
    assert not after.skipped
    kinds = {kind for _, kind, _ in after.patched}
    assert kinds == {"EfficientNet", "ConvBnAct", "EdgeResidual", "InvertedResidual"}
    assert "blocks.3.0" in {name for name, *_ in after.patched}
    lines = str(after).splitlines()
    assert re.match(r" +module +type +what", lines[0])
    assert lines[-1] == f"{len(after.patched)} fused, 0 stock"
    assert len(lines) == len(after.patched) + 2
    assert not ek.report(model.train()).skipped  # training mode is no obstacle


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("efficientnet_b0_gn", "InvertedResidual", "GroupNormAct is not BatchNorm2d"),
        ("efficientnet_blur_b0", "InvertedResidual", "anti-aliasing"),
        ("mixnet_s", "InvertedResidual", "MixedConv2d is not a plain convolution"),
        ("mobilenetv4_conv_small_035", "UniversalInvertedResidual", "universal inverted residual"),
        ("tf_efficientnet_cc_b0_4e", "CondConvResidual", "CondConv"),
        ("test_efficientnet_evos", "InvertedResidual", "EvoNorm2dS0 is not BatchNorm2d"),
    ],
)
def test_what_cannot_be_fused_is_explained(name, kind, reason):
    timm = pytest.importorskip("timm")
    model = ek.patch(timm.create_model(name).eval())
    rows = [row for row in ek.report(model).skipped if row[1] == kind]
    assert rows
    assert any(reason in why for _, _, why in rows)


def test_squeeze_excite_is_fused_where_its_block_is_not():
    model = ek.patch(timm_model("efficientnet_b0_gn"), backend="reference")
    assert {kind for _, kind, _ in ek.report(model).patched} == {"SqueezeExcite"}


def test_folded_head_of_torchvision():
    names = {name: detail for name, _, detail in ek.report(ek.patch(torchvision_model("efficientnet_b0"))).patched}
    assert "pool" in names["features.8 + avgpool"]
    assert "features.8" not in names


def test_model_inside_another():
    """Also below containers, and where one module appears twice."""
    inner = build("test_efficientnet")
    model = ek.patch(nn.ModuleDict({"a": inner, "b": inner}))
    assert all(name.startswith("a.") for name, *_ in ek.report(model).patched)
    assert not ek.report(ek.unpatch(model)).patched


BAD = {
    "channels": torch.zeros(1, 4, 32, 32),
    "no batch": torch.zeros(3, 32, 32),
    "three dimensions": torch.zeros(1, 3, 32),
    "bytes": torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    "double": torch.zeros(1, 3, 32, 32, dtype=torch.float64),
    "bfloat16": torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16),
    "complex": torch.zeros(1, 3, 32, 32, dtype=torch.complex64),
    "empty batch": torch.zeros(0, 3, 32, 32),
    "no pixel": torch.zeros(1, 3, 0, 32),
    "one pixel": torch.zeros(1, 3, 1, 1),
    "sparse": torch.zeros(1, 3, 32, 32).to_sparse(),
    "meta": torch.zeros(1, 3, 32, 32, device="meta"),
    "None": None,
    "a list": [torch.zeros(1, 3, 32, 32)],
}


def outcome(model, x):
    try:
        return model(x)
    except Exception as error:
        return type(error), str(error)


@in_turns(
    "name, training, what, backend", ["test_efficientnet", "torchvision", "block"], [False, True], list(BAD), BACKENDS
)
def test_bad_input_is_stocks_matter(name, training, what, backend):
    """The same exception with the same words, or a result where stock has one; also once calls are kept."""
    model = ek.MBConv(3, 4) if name == "block" else build(name)
    model.train(training)
    patched = model if name == "block" else ek.patch(copy.deepcopy(model), backend=backend)
    stock = copy.deepcopy(model)
    if name == "block":
        stock.bn1.act.forward = stock.bn1.act.forward  # a forward of its own: the block runs plain PyTorch
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for _ in range(1 if grad else 3):
                patched(images(2, 32))
            got, expected = outcome(patched, BAD[what]), outcome(stock, BAD[what])
        if isinstance(expected, tuple):
            assert got == expected
        else:
            assert got.shape == expected.shape
            assert got.device == expected.device


FORMS = {"list": list, "Size": torch.Size, "int": lambda pair: pair[0], "list of one": lambda pair: [pair[0]]}


@in_turns("name, form, backend", [*NAMES, "block"], list(FORMS), BACKENDS)
def test_settings_in_other_forms(name, form, backend):
    """A stride, padding or dilation that torch takes is taken."""
    model = ek.MBConv(3, 4).eval() if name == "block" else ek.patch(build(name), backend=backend)
    x = images(2, 37)
    with torch.no_grad():
        expected = model(x)
        for conv in model.modules():
            if type(conv) is nn.Conv2d:
                for setting in ("stride", "padding", "dilation", "kernel_size"):
                    setattr(conv, setting, FORMS[form](getattr(conv, setting)))
        for _ in range(4):
            assert torch.equal(model(x), expected)
        model.train()(x)
    if name != "block":
        assert not ek.report(model.eval()).skipped


def test_a_stride_in_a_list_may_change_in_place(backend):
    model = build("test_efficientnet")
    patched = ek.patch(copy.deepcopy(model), backend=backend)
    with torch.no_grad():
        for m in (model, patched):
            m.blocks[4][-1].conv_dw.stride = [1, 1]
            for _ in range(4):
                m(images(2, 37))
            m.blocks[4][-1].conv_dw.stride[:] = 2, 2
            m.blocks[4][-1].has_skip = False
        assert_same_function(patched(images(2, 37)), model(images(2, 37)))


def _parts():
    for name in ("test_efficientnet", "mobilenetv3_small_050", "torchvision"):
        model = build(name)
        yield from ((name, part) for part, _ in model.named_children())
    block = build("test_efficientnet").blocks[3][0]
    yield from (("test_efficientnet", f"blocks.3.0.{part}") for part, _ in block.named_children())


@in_turns("part, how, backend", list(_parts()), ["deleted", "Identity", "None"], BACKENDS)
def test_parts_that_are_gone(part, how, backend):
    """``report`` says what is left; a forward does, or raises, what stock's does."""
    name, path = part
    model = build(name)
    patched = ek.patch(copy.deepcopy(model), backend=backend)
    for m in (model, patched):
        parent, _, part = path.rpartition(".")
        parent = m.get_submodule(parent)
        if how == "deleted":
            delattr(parent, part)
        else:
            setattr(parent, part, nn.Identity() if how == "Identity" else None)
    if path not in ("blocks", "features"):
        assert ek.report(patched).patched
    with torch.no_grad():
        got, expected = outcome(patched, images(2, 37)), outcome(model, images(2, 37))
    if isinstance(expected, torch.Tensor):
        assert_same_function(got, expected)
    elif not (path.endswith(".aa") and how != "Identity"):  # may be missing in timm's blocks of other versions
        assert got[0] is expected[0]
