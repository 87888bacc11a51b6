"""Measuring training steps: right gradients are timed, wrong ones refused, memory counted."""

import copy
import weakref

import pytest
import torch
from torch import nn

from benchmarks import training_step
from effnet_kernels.benchmarking import contenders

NAMES = [contenders.STOCK, contenders.CHANNELS_LAST, contenders.ours("reference")]


def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU()).train()


def test_a_step_is_timed_and_its_memory_counted():
    x = torch.randn(2, 3, 10, 10)
    results = training_step.compare(block(), x, NAMES, fused=lambda stock, _: copy.deepcopy(stock), seconds=0.01)
    assert list(results) == NAMES
    maps = 4 * 2 * 8 * 8 * 8
    for result in results.values():
        assert result["median"] > 0
        assert result["error"] < 1e-5
        # The input, the inputs of BatchNorm and of SiLU, BatchNorm's two vectors.
        assert result["saved"] == 2 * maps + x.numel() * 4 + 2 * 4 * 8


def test_counting_saved_bytes_keeps_no_graph_alive():
    """A node that holds its own output would live on, and break the capture of a graph of later steps."""
    module, outputs = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid()), []
    module.register_forward_hook(lambda *call: outputs.append(weakref.ref(call[-1])))
    assert training_step.Step(module, torch.randn(2, 3, 4, 4), None).saved_bytes() == 4 * 2 * 16 * (3 + 4)
    (output,) = outputs
    assert output() is None


class Wrong(nn.Module):
    """The same output, another gradient."""

    def __init__(self, inner):
        super().__init__()
        self.inner = copy.deepcopy(inner)

    def forward(self, x):
        y = self.inner(x)
        return y + 1e-3 * (y - y.detach())


def test_wrong_gradients_are_not_timed():
    x = torch.randn(2, 3, 10, 10)
    results = training_step.compare(block(), x, NAMES, fused=lambda stock, _: Wrong(stock), seconds=0.01)
    assert "median" in results[contenders.STOCK]
    assert "allowed" in results[NAMES[-1]]["wrong"]
    assert "median" not in results[NAMES[-1]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_stock_that_is_not_finite_allows_nothing(value, monkeypatch):
    """A few roundings are left: enough for a contender that is right, not for a wrong one."""
    gradients, first = training_step.Step.gradients, []

    def lost(step):
        """float64 first, then stock."""
        result = gradients(step)
        first.append(step)
        if len(first) == 2:
            result[0] = value
        return result

    monkeypatch.setattr(training_step.Step, "gradients", lost)
    x = torch.randn(2, 3, 10, 10)
    ours = NAMES[-1:]
    results = training_step.compare(block(), x, ours, fused=lambda stock, _: copy.deepcopy(stock), seconds=0.01)
    assert "median" in results[ours[0]], results
    first.clear()
    results = training_step.compare(block(), x, ours, fused=lambda stock, _: Wrong(stock), seconds=0.01)
    assert "allowed" in results[ours[0]]["wrong"]


def test_the_module_is_left_as_it_was():
    module, x = block(), torch.randn(2, 3, 10, 10)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    training_step.Step(module, x, None).gradients()
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
