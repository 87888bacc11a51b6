"""Patched models in training against stock ones: what people do with them."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import effnet_kernels as ek
from effnet_kernels.modules import fusing
from tests.criterion import GRADIENTS, assert_as_accurate, measuring, rms
from tests.models import BACKENDS, images, randomize, timm_model, torchvision_model
from tests.patching.conftest import build
from tests.training.saved import saved_bytes
from tests.whole_models import narrow


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Once per backend: the builds of the native kernels are compared op by op."""
    return request.param


@pytest.fixture
def chains(monkeypatch):
    """The inputs of the blocks that ran fused in training so far."""
    seen = []
    call = fusing.conv_block
    monkeypatch.setattr(fusing, "conv_block", lambda x, *a, **k: (seen.append(x), call(x, *a, **k))[1])
    return seen


def narrow_b0(**kwargs: object) -> nn.Module:
    """EfficientNet-B0 with a quarter of its channels, one block a stage, in training mode."""
    torch.manual_seed(0)
    stages = ["ds_r1_k3_s1_e1_c8_se0.25", "ir_r2_k3_s2_e6_c8_se0.25", "ir_r2_k5_s2_e6_c16_se0.25"]
    return randomize(narrow(stages, num_features=64, **kwargs)).train()


def narrow_v2() -> nn.Module:
    """EfficientNetV2 in TensorFlow's padding with one block a stage, three of them fused MBConvs."""
    model = build("tf_efficientnetv2_b0").train()
    for stage in model.blocks:
        del stage[1:]
    return model


def backward(model: nn.Module, x: Tensor, seed: int = 3) -> list[Tensor]:
    """Output, gradients and buffers of one step, flat and in double."""
    torch.manual_seed(seed)
    y = model(x)
    y.float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [torch.cat([t.double().flatten() for t in ts]) for ts in ([y.detach()], grads, list(model.buffers()))]


def assert_as_accurate_as_stock(stock: nn.Module, patched: nn.Module, x: Tensor) -> None:
    """Output, gradients and buffers, both in float32, against float64."""
    exact = backward(copy.deepcopy(stock).double(), x.double())
    for e, s, p in zip(exact, backward(stock, x), backward(patched, x), strict=True):
        assert_as_accurate(p, s, e, GRADIENTS * torch.finfo(torch.float32).eps)


def patched_twin(model: nn.Module, backend: str) -> nn.Module:
    return ek.patch(copy.deepcopy(model), backend=backend)


def test_a_step(backend, chains):
    model = narrow_b0()
    twin = patched_twin(model, backend)
    assert_as_accurate_as_stock(model, twin, images(4, 40))
    assert len(chains) == len(ek.report(twin).patched)


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, None])
def test_running_statistics(momentum, backend):
    model = narrow_b0()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    twin = patched_twin(model, backend)
    for seed in range(3):
        for m in (model, twin):
            with torch.no_grad():
                m(images(3, 33, seed=seed))
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4, msg=name)
    counts = [b for name, b in twin.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(int(count) == 3 for count in counts)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_stochastic_depth_drops_what_stock_drops(library, backend, chains):
    """The same seed gives the same samples; rates so high that every step drops some."""
    if library == "timm":
        model = narrow_b0(drop_path_rate=0.6)
    else:
        model = torchvision_model("efficientnet_b0", num_classes=10, stochastic_depth_prob=0.6, dropout=0.3).train()
        del model.features[4:8]
        model.features[4][0] = nn.Conv2d(40, 1280, 1, bias=False)
    twin = patched_twin(model, backend)
    assert_as_accurate_as_stock(model, twin, images(6, 40))
    assert chains


def frozen_norms(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    return model


def test_frozen_norms(backend, chains):
    model = frozen_norms(narrow_b0())
    twin = patched_twin(model, backend)
    before = [b.clone() for b in twin.buffers()]
    assert_as_accurate_as_stock(model, twin, images(4, 40))
    assert chains
    assert all(torch.equal(a, b) for a, b in zip(before, twin.buffers(), strict=True))


def test_frozen_backbone(backend):
    """No gradient for what needs none, and nothing kept for it; statistics still move, as stock's do."""
    model = narrow_b0()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("classifier"))
    twin = patched_twin(model, backend)
    x = images(4, 40)
    assert_as_accurate_as_stock(model, twin, x)
    assert all((p.grad is not None) == p.requires_grad for p in twin.parameters())
    assert saved_bytes(twin, lambda: twin(x)) == 4 * (4 * 64)  # the input of the classifier


def test_frozen_first_half(backend):
    """Blocks in front of the first trained one keep nothing; in the others nothing is kept for frozen weights."""
    model = narrow_b0()
    twin = patched_twin(model, backend)
    trained = copy.deepcopy(twin)
    everything = saved_bytes(trained, lambda: trained(images(2, 64)))
    for m in (model, twin):
        m.conv_stem.requires_grad_(False)
        m.bn1.requires_grad_(False)
        m.blocks[:2].requires_grad_(False)
    assert_as_accurate_as_stock(model, twin, images(2, 64))
    assert saved_bytes(twin, lambda: twin(images(2, 64))) < everything / 3


@pytest.mark.parametrize(("name", "size"), [("efficientnet_b0", 64), ("tf_efficientnetv2_s", 64)])
def test_saved_bytes(name, size):
    """The promise of docs/training.md: at most 45% of what stock keeps."""
    model = timm_model(name).train()
    x = images(2, size)
    stock = saved_bytes(model, lambda: model(x))
    ek.patch(model, backend=BACKENDS[-1])
    assert saved_bytes(model, lambda: model(x)) <= 0.45 * stock


def test_saved_bytes_of_a_block(backend):
    """Input, raw maps, statistics, mean and gate: to the byte."""
    model = timm_model("efficientnet_b0").train()
    block = ek.patch(model.blocks[2][0], backend=backend)  # 24 -> 144 -> 40, k5, stride 2
    x = images(2, 28, channels=24).to(memory_format=torch.channels_last).requires_grad_()
    floats = 2 * (24 * 28**2 + 144 * 28**2 + 144 * 14**2 + 40 * 14**2) + 2 * (144 + 144 + 40) + 2 * 2 * 144
    assert saved_bytes(block, lambda: block(x)) == 4 * floats


def test_checkpointing(backend):
    """Recomputed blocks: gradients as without, and statistics moved twice, as stock's are.

    Recomputation ends early, at the last tensor kept: inside the last block, before it moves its statistics again.
    """
    model = narrow_b0()
    twin = patched_twin(model, backend)
    for m in (model, twin):
        m.set_grad_checkpointing(True)
    with set_checkpoint_early_stop(False):
        assert_as_accurate_as_stock(model, twin, images(4, 40))


def test_one_block_used_twice(backend):
    block = timm_model("efficientnet_b0").train().blocks[2][1]
    twin = patched_twin(block, backend)

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(checkpoint(self.inner, self.inner(x), use_reentrant=False))

    with set_checkpoint_early_stop(False):
        assert_as_accurate_as_stock(Twice(block), Twice(twin), images(3, 14, channels=40))


def test_autocast(backend):
    """bfloat16 convolutions, float32 parameters, as stock: error against float64 at most twice stock's."""
    model = narrow_b0()
    twin = patched_twin(model, backend)
    x = images(4, 40)
    exact = backward(copy.deepcopy(model).double(), x.double())
    results = []
    for m, how in ((model, measuring()), (twin, contextlib.nullcontext())):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16), how:
            y = m(x)
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in m.parameters())
        results.append([y.detach().double().flatten(), torch.cat([p.grad.double().flatten() for p in m.parameters()])])
    for e, s, p in zip(exact[:2], *results, strict=True):
        assert_as_accurate(p, s, e, noise=0)


def test_gradient_scaler(backend):
    """Scaled losses unscale to the same step, and an overflow skips it."""
    twin = ek.patch(narrow_b0(), backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(twin.parameters(), 0.01)
    x = images(4, 40)
    plain = backward(copy.deepcopy(twin), x)[1]
    torch.manual_seed(3)
    scaler.scale(twin(x).square().sum()).backward()
    scaler.unscale_(optimizer)
    got = torch.cat([p.grad.double().flatten() for p in twin.parameters()])
    assert rms(got - plain) <= 1e-5 * rms(plain)
    before = [p.clone() for p in twin.parameters()]
    twin.conv_stem.weight.grad[0] = torch.inf
    scaler._per_optimizer_states.clear()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, twin.parameters(), strict=True))


@pytest.mark.exhaustive
def test_a_compiled_training_step(backend):
    """Forward and backward as one graph each; buffers are updated inside."""
    model = ek.patch(narrow_b0(), backend=backend)
    twin = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        expected, got = (backward(m, images(4, 40, seed=seed)) for m in (model, compiled))
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_other_norms_train_as_stock(backend, chains):
    """SyncBatchNorm and GroupNorm in a block: its stock forward runs."""
    model = narrow_b0().blocks[1][1]
    for norm in (nn.SyncBatchNorm(model.bn1.num_features), nn.GroupNorm(4, model.bn1.num_features)):
        twin = copy.deepcopy(model)
        twin.bn1 = norm
        stock = copy.deepcopy(twin)
        ek.patch(twin, backend=backend)
        if isinstance(norm, nn.GroupNorm):  # SyncBatchNorm needs a process group
            assert torch.equal(twin(images(2, 9, channels=8)), stock(images(2, 9, channels=8)))
        assert all(row[1] == "SqueezeExcite" for row in ek.report(twin).patched)
    assert not chains


def test_one_value_per_channel_raises_as_stock(backend):
    block = narrow_b0().blocks[1][1]
    x = images(1, 1, channels=8)
    with pytest.raises(ValueError, match="Expected more than 1 value") as stock:
        block(x)
    with pytest.raises(ValueError, match="Expected more than 1 value") as patched:
        ek.patch(block, backend=backend)(x)
    assert str(stock.value) == str(patched.value)
