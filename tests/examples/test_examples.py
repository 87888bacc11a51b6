"""The examples run, on images and for steps so few that they take seconds, and do what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import effnet_kernels as ek
from tests.models import BACKENDS
from tests.ops.conftest import one_thread

__all__ = ["one_thread"]

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_trainable_parameters(library, patched):
    """The numbers of EfficientNet-B0 with ten classes: 1280 * 10 + 10 in the head."""
    pytest.importorskip(library)
    finetune = load("finetune")
    model, head = finetune.build(library, "efficientnet_b0", False)
    if patched:
        ek.patch(model)
    for phase, trainable in ((1, "12,810"), (2, "4,020,358")):
        text = finetune.set_phase(model, head, phase)
        assert text == f"phase {phase}: {trainable} trainable of 4,020,358 parameters"


def test_finetune(tmp_path, capsys):
    """Stock and patched learn the same, and the frozen phase leaves the backbone alone."""
    finetune = load("finetune")
    out = tmp_path / "curves.png"
    arguments = ["--model", "test_efficientnet", "--size", "32", "--batch", "16", "--steps", "4", "--epochs", "1"]
    histories = finetune.main([*arguments, "--backend", BACKENDS[-1], "--out", str(out)])
    stock, patched = (torch.tensor(histories[name]["loss"]) for name in ("stock", "patched"))
    assert len(stock) == 2 * 4
    torch.testing.assert_close(patched, stock, rtol=1e-3, atol=1e-3)
    assert out.stat().st_size > 0
    printed = capsys.readouterr().out
    assert "phase 1" in printed
    assert "loss" in printed


def test_frozen_phase():
    finetune = load("finetune")
    model, head = finetune.build("timm", "test_efficientnet", False)
    ek.patch(model, backend=BACKENDS[-1])
    finetune.set_phase(model, head, 1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_digits():
    finetune = load("finetune")
    x, y, x_test, y_test = finetune.digits(16)
    assert x.shape == (1500, 3, 16, 16)
    assert len(x_test) == len(y_test) == 297
    assert x.min() >= -1
    assert x.max() <= 1
    assert set(y.tolist()) == set(range(10))


def test_progressive(tmp_path):
    """Three resolutions; on a CPU nothing is compiled at any of them."""
    progressive = load("progressive")
    arguments = ["--model", "test_efficientnet", "--sizes", "24", "32", "40", "--steps", "3", "--batch", "16"]
    out = tmp_path / "curves.png"
    histories = progressive.main([*arguments, "--backend", BACKENDS[-1], "--out", str(out)])
    stock, patched = (torch.tensor(histories[name]["loss"]) for name in ("stock", "patched"))
    torch.testing.assert_close(patched, stock, rtol=1e-3, atol=1e-3)
    assert histories["patched"]["compiled"] == [0, 0, 0]
    assert out.stat().st_size > 0


def test_augmentation_grows():
    progressive = load("progressive")
    x = torch.randn(4, 3, 64, 64)
    change = [
        (progressive.augment(x, strength, torch.Generator().manual_seed(1)) - x).abs().mean()
        for strength in (0.0, 0.5, 1.0)
    ]
    assert change[0] == 0
    assert change[0] < change[1] < change[2]
