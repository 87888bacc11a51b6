"""patch, unpatch and report themselves: bad input, rollback, what the report says."""

import re
import sys

import pytest
import torch
from torch import nn

import effnet_kernels as ek
from effnet_kernels.patching import core
from tests.models import timm_model, torchvision_model
from tests.patching.conftest import build


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
    available = sys.modules["effnet_kernels.backends"]._AVAILABLE  # the attribute of that name is the function
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


def test_bad_input_to_a_patched_model(backend):
    model = ek.patch(build("test_efficientnet"), backend=backend)
    with torch.no_grad():
        for x in (torch.zeros(3, 32, 32), torch.zeros(1, 3, 32)):
            with pytest.raises(ValueError, match=r"x must have shape \[N, C, H, W\]"):
                model(x)
        with pytest.raises(TypeError, match="floating-point"):
            model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        with pytest.raises(TypeError, match="dtype of x"):
            model(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match=r"expand\.weight must have shape"):
            model(torch.zeros(1, 4, 32, 32))
