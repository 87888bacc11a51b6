"""Frozen models on a GPU, without one: a dispatch mode takes the place of the CUDA graph, and replays what it saw."""

import contextlib
import copy
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import effnet_kernels as ek
from effnet_kernels.modules import program
from tests.criterion import assert_same_function
from tests.patching.conftest import build


class Graph(TorchDispatchMode):
    """Notes every op while it is a context, and makes them again with the results in the same places."""

    captures = 0

    def __init__(self):
        super().__init__()
        self.ops, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            for to, made in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(to, torch.Tensor) and to.data_ptr() != made.data_ptr():
                    to.copy_(made)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were captured; the CPU is taken for a GPU."""
    made = []

    @contextlib.contextmanager
    def capture(graph):
        made.append(graph)
        with graph:
            yield

    nothing = types.SimpleNamespace(
        wait_stream=lambda stream: None, wait_event=lambda event: None, record=lambda stream: None
    )
    monkeypatch.setattr(program, "on_gpu", lambda x: True)
    for name, value in {
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": lambda: nothing,
        "Event": lambda: nothing,
        "current_stream": lambda: nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


@pytest.fixture
def model():
    return ek.patch(build("test_efficientnet"), backend="reference", frozen=True)


@torch.inference_mode()
def test_a_forward_is_one_graph(graphs, model, x):
    expected = copy.deepcopy(model)(x)
    first = model(x)
    assert len(graphs) == 2  # one of each model
    outputs = [model(x), model(x.flip(3))]
    assert graphs[1].replays == 2
    for y in (first, outputs[0]):
        torch.testing.assert_close(y, expected)
    assert_same_function(outputs[1], ek.unpatch(copy.deepcopy(model))(x.flip(3)))
    model(x[:1])
    model(x[:1])
    assert [graph.replays for graph in graphs[1:]] == [2, 1]


CHANGES = {
    "a hook": lambda m: m.blocks[4].register_forward_hook(lambda *_: None),
    "a hook inside": lambda m: m.blocks[4][-1].conv_pw.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("frozen", [False, True])
@torch.inference_mode()
def test_only_what_is_frozen_and_whole_is_captured(graphs, frozen, x):
    for change in (None, *CHANGES) if frozen else (None,):
        model = ek.patch(build("test_efficientnet"), backend="reference", frozen=frozen)
        if change is not None:
            CHANGES[change](model)
        graphs.clear()
        assert_same_function(model(x), ek.unpatch(copy.deepcopy(model))(x))
        assert bool(graphs) == (frozen and change is None), change


def test_what_ends_it(graphs, model, x):
    with torch.inference_mode():
        model(x)
        assert torch.equal(model(x), model(x))
    assert graphs[0].replays == 2
    for change in (lambda: model.load_state_dict(model.state_dict()), lambda: model.double().float()):
        change()
        with torch.no_grad():
            model(x)
    assert len(graphs) == 3
    model.train().eval()
    with torch.no_grad():
        model(x)
    assert len(graphs) == 3
    assert not any("frozen" in what for _, _, what in ek.report(model).patched)
