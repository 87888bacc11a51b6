"""One result, whichever door of a model people take: timm's and torchvision's ways in, eval and training."""

import copy
import sys

import pytest
import torch

import effnet_kernels as ek
from tests.criterion import assert_same_function
from tests.models import BACKENDS, images, timm_model
from tests.patching.conftest import build
from tests.thinning import daily, in_turns

NAMES = ["test_efficientnet", "mobilenetv3_small_050", "tf_efficientnetv2_b0"]

DOORS = {
    "forward": lambda m, x: m(x),
    "features, head": lambda m, x: m.forward_head(m.forward_features(x)),
    "intermediates, head": lambda m, x: m.forward_head(m.forward_intermediates(x)[0]),
    "some intermediates, head": lambda m, x: m.forward_head(m.forward_intermediates(x, indices=2)[0]),
    "pre-logits, classifier": lambda m, x: m.get_classifier()(m.forward_head(m.forward_features(x), pre_logits=True)),
}
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}


@in_turns("mode, training, backend", list(MODES), [False, True], BACKENDS)
@pytest.mark.parametrize("name", daily(NAMES, NAMES[:2]))
def test_same_bits(name, training, mode, backend):
    """With and without checkpointing, and in the calls after the first, which are kept."""
    model = ek.patch(build(name), backend=backend).train(training)
    state = copy.deepcopy(model.state_dict())
    first = None
    for _ in range(3):
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            for door, call in DOORS.items():
                model.load_state_dict(state)
                torch.manual_seed(0)
                with MODES[mode]():
                    y = call(model, images(2, 37))
                first = y if first is None else first
                assert torch.equal(y, first), (door, checkpointing)


def modules_called(call):
    """Whose ``forward`` runs."""
    seen = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_name == "forward":
            seen.add(frame.f_locals.get("self"))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", NAMES)
def test_stem_and_head_are_fused_behind_every_door(name, training, backend):
    model = ek.patch(build(name), backend=backend).train(training)
    norms = {getattr(model, part) for part in ("bn1", "bn2") if hasattr(model, part)}
    for door in DOORS.values():
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            assert not norms & modules_called(lambda door=door: door(model, images(2, 37)))
    handle = model.bn1.register_forward_hook(lambda *_: None)
    assert model.bn1 in modules_called(lambda: model(images(2, 37)))
    handle.remove()


@in_turns("name, training, backend", ["efficientnet_b0", "mobilenetv3_small_050"], [False, True], BACKENDS)
def test_features_only(name, training, backend):
    """The features of a backbone are the intermediates of the model, to the bit."""
    whole = ek.patch(timm_model(name), backend=backend).train(training)
    backbone = timm_model(name, features_only=True).train(training)
    backbone.load_state_dict(whole.state_dict(), strict=False)
    stock = copy.deepcopy(backbone)
    ek.patch(backbone, backend=backend)
    for checkpointing in (False, True):
        backbone.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        features = backbone(images(2, 64))
        torch.manual_seed(0)
        intermediates = whole.forward_intermediates(images(2, 64), intermediates_only=True)
        torch.manual_seed(0)
        expected = copy.deepcopy(stock)(images(2, 64))
        for f, i, e in zip(features, intermediates, expected, strict=True):
            assert torch.equal(f, i)
            torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-3)
        for m in (backbone, whole):
            m.load_state_dict(stock.state_dict(), strict=False)


def feature_net(cls, model):
    """What timm makes of a model for ``features_only=True, feature_cls=...``: its children in a ModuleDict."""
    return getattr(pytest.importorskip("timm").models, cls)(copy.deepcopy(model), flatten_sequential=True)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("test_efficientnet", "FeatureListNet"),
        ("test_efficientnet", "FeatureHookNet"),
        ("mobilenetv3_small_050", "FeatureDictNet"),
    ],
)
def test_features_of_a_rebuilt_model(name, cls, training, backend):
    stock = build(name).train(training)
    whole, net = ek.patch(copy.deepcopy(stock), backend=backend), feature_net(cls, stock)
    stock_class, state = type(net), copy.deepcopy(net.state_dict())
    ek.patch(net, backend=backend)
    assert ("conv_stem + bn1", cls) in [row[:2] for row in ek.report(net).patched]
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)
        for mode in MODES.values():
            net.load_state_dict(state)
            whole.load_state_dict(stock.state_dict())
            features = []
            torch.manual_seed(0)
            with mode():
                assert net.bn1 not in modules_called(lambda: features.append(net(images(2, 37))))  # noqa: B023
            torch.manual_seed(0)
            with mode():
                expected = whole.forward_intermediates(images(2, 37), intermediates_only=True)
            got = [*features[0].values()] if cls == "FeatureDictNet" else features[0]
            assert len(got) == len(expected)
            assert all(map(torch.equal, got, expected))
    assert type(ek.unpatch(net)) is stock_class


@pytest.mark.parametrize("cls", ["FeatureListNet", "FeatureDictNet"])
def test_features_from_inside_the_stem(cls, backend):
    """What the convolution alone gives can be asked for, too; then nothing is left out."""
    stock = feature_net(cls, build("test_efficientnet"))
    early = ek.patch(copy.deepcopy(stock), backend=backend)
    for net in (stock, early):
        net.return_layers["conv_stem"] = "stem"
    late = ek.patch(copy.deepcopy(stock), backend=backend)
    with torch.no_grad():
        expected, *features = [net(images(2, 37)) for net in (stock, early, late)]
    assert type(late) is type(stock)
    assert len(expected) == 6
    for got in features:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_features_of_other_models_are_not_ours():
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_resnet", features_only=True)
    with pytest.raises(ValueError, match="found none in FeatureListNet"):
        ek.patch(net)
    net.blocks = build("test_efficientnet").blocks  # some that are, inside
    cls = type(net)
    ek.patch(net)
    assert type(net) is cls
    assert all("FeatureListNet" not in row for row in ek.report(net).skipped)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_torchvision(training, backend):
    """``features`` by itself, whole or module by module, is the same to the bit; with its pool the head is one call."""
    model = ek.patch(build("torchvision"), backend=backend).train(training)
    state = copy.deepcopy(model.state_dict())
    doors = [
        model.features,
        lambda x: [x := m(x) for m in model.features][-1],
    ]
    outputs = []
    for _ in range(3):
        for door in doors:
            model.load_state_dict(state)
            torch.manual_seed(0)
            with torch.no_grad():
                outputs.append(door(images(2, 37)))
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    with torch.no_grad():
        for _ in range(4):
            whole = model.eval()(images(2, 37))
        features = model.features(images(2, 37))
        composed = model.classifier(torch.flatten(model.avgpool(features), 1))
    assert_same_function(whole, composed)
