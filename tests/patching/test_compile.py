"""Patched models under torch.compile, torch.export, fx feature extraction and DistributedDataParallel."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

import effnet_kernels as ek
from tests.criterion import assert_same_function
from tests.models import BACKENDS, images
from tests.patching.conftest import NAMES, build
from tests.thinning import daily, in_turns

# Compiling takes seconds: the last backend every day.
each_backend = pytest.mark.parametrize("backend", daily(BACKENDS, BACKENDS[-1:]))
EVERY_DAY = [("test_efficientnet", BACKENDS[-1]), ("torchvision", "reference")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counting(targets):
    """A compiler backend that runs the graph as it is and notes the fused ops in it."""

    def compiler(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        targets.extend(str(n.target) for n in graph.graph.nodes if str(n.target).startswith("effnet_kernels."))
        return graph

    return compiler


@pytest.mark.parametrize(("name", "backend"), daily(itertools.product(NAMES, BACKENDS), EVERY_DAY))
def test_one_graph_with_the_ops_in_it(name, x, backend):
    model = ek.patch(build(name), backend=backend)
    targets = []
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, backend=counting(targets))(x)
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)
    assert len(targets) == len(ek.report(model).patched)


@pytest.mark.exhaustive
def test_features_in_one_graph(x, backend):
    timm = pytest.importorskip("timm")
    net = timm.models.FeatureListNet(build("test_efficientnet"), flatten_sequential=True)
    ek.patch(net, backend=backend)
    targets = []
    with torch.no_grad():
        features = torch.compile(net, fullgraph=True, backend=counting(targets))(x)
        assert all(map(torch.equal, features, net(x)))
    assert len(targets) == len(ek.report(net).patched) == 1 + sum(map(len, build("test_efficientnet").blocks))


@each_backend
def test_gradients_through_aot(x, backend):
    model = ek.patch(build("test_efficientnet"), backend=backend)
    gradients = []
    for m in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        m(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
def test_inductor(x, backend):
    model = ek.patch(build("test_efficientnet"), backend=backend)
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True)(x)
        assert_same_function(y, model(x))


def test_training_mode_compiles(x):
    model = ek.patch(build("test_efficientnet"), backend="reference")
    targets = []
    y = torch.compile(model.train(), fullgraph=True, backend=counting(targets))(x)
    assert y.shape == (2, 10)
    assert len(targets) == len(ek.report(model).patched)
    assert all("conv_block_train" in target for target in targets)


@pytest.mark.exhaustive
def test_a_changed_attribute_recompiles(x):
    model = ek.patch(build("test_efficientnet"), backend="reference")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(x)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eps = 0.5
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@in_turns("name, strict", NAMES[::3], [False, True])
def test_export(name, x, strict):
    model = ek.patch(build(name), backend="reference")
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
        called = [str(n.target) for n in program.graph.nodes if str(n.target).startswith("effnet_kernels.")]
        assert len(called) == len(ek.report(model).patched)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)


def test_export_with_a_batch_of_any_size(x):
    model = ek.patch(build("tf_efficientnetv2_b0"), backend="reference")
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        for n in (1, 5):
            more = images(n, 37)
            torch.testing.assert_close(program.module()(more), model(more), rtol=1e-5, atol=1e-6)


@pytest.mark.exhaustive
def test_exported_program_in_a_fresh_process(x, backend, tmp_path):
    model = ek.patch(build("test_efficientnet"), backend=backend)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
        torch.save((x, model(x)), tmp_path / "data.pt")
    code = f"""
import sys, torch, effnet_kernels
program = torch.export.load({str(tmp_path / "model.pt2")!r})
x, y = torch.load({str(tmp_path / "data.pt")!r})
torch.testing.assert_close(program.module()(x), y, rtol=1e-5, atol=1e-6)
assert "timm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_feature_extraction_by_fx(x):
    pytest.importorskip("timm")
    from timm.models import create_feature_extractor

    stock = build("mobilenetv3_small_050")
    patched = ek.patch(copy.deepcopy(stock), backend="reference")
    nodes = ["blocks.1.0", "blocks.3"]
    with torch.no_grad():
        for got, expected in zip(
            create_feature_extractor(patched, nodes)(x).values(),
            create_feature_extractor(stock, nodes)(x).values(),
            strict=True,
        ):
            assert_same_function(got, expected)


_DDP = """
import os, sys, torch, timm, effnet_kernels as ek
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from effnet_kernels.modules import fusing
from tests.models import timm_model
fused, call = [], fusing.conv_block
fusing.conv_block = lambda *args, **kwargs: fused.append(1) or call(*args, **kwargs)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.set_num_threads(1)
grads = []
for patched in (False, True):
    model = timm_model("test_efficientnet", num_classes=10)
    if patched:
        ek.patch(model, backend=sys.argv[3])
    parallel = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(4, 3, 33, 33, generator=generator)
    parallel.train()(x).square().sum().backward()
    train = torch.cat([p.grad.flatten() for p in model.parameters()])
    parallel.zero_grad()
    parallel.eval()(x).square().sum().backward()
    grads.append((train, torch.cat([p.grad.flatten() for p in model.parameters()])))
for stock, patched in zip(*grads):
    torch.testing.assert_close(stock, patched, rtol=1e-3, atol=1e-3)
assert fused, "stock blocks were trained"
for mine in grads[1]:
    everyone = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyone, mine)
    assert torch.equal(*everyone), "ranks differ"
dist.destroy_process_group()
# Wrapped models, and torch itself, keep threads of gloo, which may abort a process whose interpreter ends.
os._exit(0)
"""


@pytest.mark.exhaustive
def test_two_processes_under_ddp(tmp_path):
    pytest.importorskip("timm")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _DDP, str(rank), str(tmp_path / "store"), BACKENDS[-1]], stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
