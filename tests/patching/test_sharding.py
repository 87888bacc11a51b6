"""Models sharded by FSDP2, and otherwise given to torch.distributed: patched before or after, they run fused."""

import contextlib
import copy
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import effnet_kernels as ek
from effnet_kernels.modules import fusing
from tests.criterion import assert_same_function, measuring, rms
from tests.models import BACKENDS, timm_model
from tests.patching.conftest import build

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")

BLOCKS = {"test_efficientnet": 5, "torchvision": 3}
UNITS = ["root", "blocks", "blocks and root"]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """One process, this one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops called so far."""
    calls: list[str] = []
    names = ("mbconv", "fused_mbconv", "pointwise_conv_bn_act", "depthwise_conv_bn_act", "squeeze_excite")
    for module, name in [*((fusing.F, name) for name in names), (fusing, "conv_block")]:
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, op=op, **k: (calls.append(name), op(*a, **k))[1])
    return calls


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks, and of torchvision the stem too."""
    stages = model.blocks if hasattr(model, "blocks") else list(model.features)[:-1]  # type: ignore[arg-type]
    return [block for stage in stages for block in (stage if type(stage) is nn.Sequential else [stage])]


def shard(model: nn.Module, mesh: DeviceMesh, units: str = "blocks and root", **options: object) -> nn.Module:
    if "blocks" in units:
        for block in blocks(model):
            fully_shard(block, mesh=mesh, **options)  # type: ignore[arg-type]
    if "root" in units:
        fully_shard(model, mesh=mesh, **options)  # type: ignore[arg-type]
    return model


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def local(t: Tensor) -> Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


def step(model: nn.Module, x: Tensor, train: bool) -> list[Tensor]:
    """Output, gradients and buffers."""
    torch.manual_seed(3)
    y = model.train(train)(x)
    y.square().sum().backward()
    return [y.detach(), *(local(p.grad) for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("patched_first", [True, False], ids=["patched first", "sharded first"])
@pytest.mark.parametrize("name", BLOCKS)
def test_sharded_is_fused_and_gives_the_same_bits(name, patched_first, units, mesh, fused, x):
    """As the same model unsharded: report, inference, gradients and statistics; unpatched it is stock."""
    stock = build(name)
    whole = ek.patch(copy.deepcopy(stock), backend=BACKENDS[-1])
    sharded, plain = copy.deepcopy(stock), shard(copy.deepcopy(stock), mesh, units)
    if patched_first:
        shard(ek.patch(sharded, backend=BACKENDS[-1]), mesh, units)
    else:
        before = classes(shard(sharded, mesh, units))
        assert all(reason.startswith("not patched: ") for *_, reason in ek.report(sharded).skipped)
        ek.patch(sharded, backend=BACKENDS[-1])
    report = ek.report(sharded)
    assert [row[:2] for row in report.patched] == [row[:2] for row in ek.report(whole).patched]
    assert not report.skipped
    assert [c.__name__ for c in classes(sharded)] == [c.__name__ for c in classes(plain)]
    assert list(sharded.state_dict()) == list(stock.state_dict())

    outputs: list[list[Tensor]] = []
    for m in (sharded, whole):
        fused.clear()
        with torch.no_grad():
            outputs.append([m.eval()(x) for _ in range(4)])
        assert len(fused) >= BLOCKS[name]
    assert all(map(torch.equal, *outputs))
    for train in (False, True):
        results = []
        for m in (sharded, whole):
            fused.clear()
            results.append(step(m, x, train))
            assert fused.count("conv_block") >= BLOCKS[name] or not train
        assert len(results[0]) == len(results[1])
        assert all(map(torch.equal, *results))

    ek.unpatch(sharded)
    assert not ek.report(sharded).patched
    if not patched_first:
        assert classes(sharded) == before
    assert [c.__mro__[1:] for c in classes(sharded)] == [c.__mro__[1:] for c in classes(plain)]
    fused.clear()
    with torch.no_grad():
        sharded.eval()(x)
    assert not fused


def test_stock_and_patched_models_in_one_process(mesh, fused, x):
    """torch keeps the classes that it wraps by the class below: neither model may get the other's."""
    stock, patched = build("test_efficientnet"), ek.patch(build("test_efficientnet"), backend=BACKENDS[-1])
    for first, second in ((stock, patched), (ek.patch(copy.deepcopy(stock)), ek.unpatch(copy.deepcopy(stock)))):
        for m in (first, second):
            shard(m, mesh)
    assert not ek.report(stock).patched
    assert not ek.report(second).patched
    assert not ek.report(patched).skipped
    with torch.no_grad():
        stock(x), second(x)
        assert not fused
        patched(x)
        assert fused


def test_weights_written_while_sharded(mesh):
    """FSDP writes into the same tensors, past their versions, often at the same address: one value must be seen."""
    stock = timm_model("efficientnet_b0").blocks[5][1]
    blocks = [stock, ek.patch(copy.deepcopy(stock), backend=BACKENDS[-1])]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    x = torch.randn(1, 192, 7, 7, generator=torch.Generator().manual_seed(0))
    for i in range(8):
        with torch.no_grad():
            for block in blocks:
                block.reshard()
                values = local(block.conv_pw.weight).view(-1)
                values[1009 * i + 7] += 5
            torch.testing.assert_close(*(block(x) for block in blocks), rtol=1e-3, atol=1e-4)


def test_squeeze_excite_sharded_by_itself(mesh, fused, x):
    """A module that is patched by itself reads itself: behind its wrapper too."""
    model = build("test_efficientnet")
    stock = copy.deepcopy(model)
    se = fully_shard(ek.patch(model.blocks[4][0].se, backend="reference"), mesh=mesh)
    assert [row[1] for row in ek.report(se).patched] == ["SqueezeExcite"]
    ek.patch(model, backend="reference")
    assert {name: reason for name, _, reason in ek.report(model).skipped} == {
        "blocks.4.0": "FSDPSqueezeExcite has hooks or a forward of its own"
    }
    with torch.no_grad():
        assert_same_function(model(x), stock(x))
    assert fused.count("squeeze_excite") == 1


def test_child_sharded_by_itself(mesh, fused, x):
    """Its weights are there only in its own call, so its block calls it."""
    model = build("test_efficientnet")
    block = model.blocks[4][0]
    stock = copy.deepcopy(model)
    fully_shard(block.conv_pw, mesh=mesh)
    ek.patch(model, backend="reference")
    rows = {name: reason for name, _, reason in ek.report(model).skipped}
    assert rows == {"blocks.4.0": "FSDPConv2d has hooks or a forward of its own"}
    with torch.no_grad():
        assert_same_function(model(x), stock(x))
    assert fused.count("mbconv") == 1
    assert fused.count("squeeze_excite") == 1


def test_parameters_in_bfloat16(mesh, x):
    """FSDP's mixed precision casts parameters and inputs, not the running statistics, which stock refuses on a CPU."""
    stock = build("test_efficientnet")
    with torch.no_grad():
        exact = stock(x)
    errors = []
    for patched, buffers in ((False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float32)):
        model = copy.deepcopy(stock)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer.to(buffers)
        if patched:
            ek.patch(model, backend=BACKENDS[-1])
        shard(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with torch.no_grad(), contextlib.nullcontext() if patched else measuring():
            y = model(x)
        assert y.dtype == torch.bfloat16
        errors.append(rms(y - exact))
    assert max(errors[1:]) <= 2 * errors[0]


@pytest.mark.parametrize("patched_first", [True, False])
def test_composable_data_parallel(patched_first, mesh, x):
    """It wraps the root's class; test_two_processes has the one that is made of FSDP's parts."""
    model = build("test_efficientnet")
    stock = classes(model)
    with torch.no_grad():
        expected = ek.patch(copy.deepcopy(model), backend=BACKENDS[-1])(x)
    if patched_first:
        ek.patch(model, backend=BACKENDS[-1])
    replicate(model)
    before = classes(model)
    ek.patch(model, backend=BACKENDS[-1])
    assert len(ek.report(model).patched) == 7
    assert not ek.report(model).skipped
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    ek.unpatch(model)
    assert not ek.report(model).patched
    assert classes(model)[1:] == stock[1:]
    assert type(model).__name__ == "DDPEfficientNet"
    assert patched_first or classes(model) == before


def test_distributed_data_parallel(mesh, x):
    model = ek.patch(build("test_efficientnet"), backend=BACKENDS[-1])
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    results = [step(m, x, True) for m in (model, parallel)]
    assert all(map(torch.equal, *results))
    assert {name.split(".")[0] for name, *_ in ek.report(parallel).patched} == {"module"}
    assert not ek.report(ek.unpatch(parallel)).patched


TWO = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
import effnet_kernels as ek
from tests.models import images
from tests.patching.conftest import build
from tests.patching.test_sharding import classes, shard

rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
x = images(4, 37)[2 * rank : 2 * rank + 2]
for wrap in (shard, lambda model, mesh: replicate(model, mesh=mesh)):
    results = []
    for patched in (False, True):
        model = wrap(build("test_efficientnet"), mesh)
        before = classes(model)
        if patched:
            ek.patch(model)
            assert len(ek.report(model).patched) == 7
            assert not ek.report(model).skipped
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            with torch.no_grad():
                model.eval()(x)
            model.train()(x).square().mean().backward()
            gradients = [p.grad.full_tensor() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            results.append([model.eval()(x), torch.cat([g.flatten() for g in gradients])])
        ek.unpatch(model)
        assert classes(model) == before
    for stock, ours in zip(*results):
        error = (stock - ours).square().mean().sqrt() / stock.square().mean().sqrt()
        assert 0 < error < 1e-4, error
dist.destroy_process_group()
# Wrapped models, and torch itself, keep threads of gloo, which may abort a process whose interpreter ends.
os._exit(0)
"""


@pytest.mark.exhaustive
def test_two_processes(tmp_path):
    """A half of every weight in each, and then all of it in each: two steps of training as stock."""
    command = [sys.executable, "-c", TWO]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")]) for rank in (0, 1)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
