"""The modules against timm's blocks: same constructor, same state_dict, same numbers in eval and in training."""

import functools
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import effnet_kernels as ek
from effnet_kernels.benchmarking.agreement import exact_output
from effnet_kernels.modules import fusing
from tests.criterion import assert_as_accurate, measuring
from tests.models import images, randomize


def timm_blocks():
    pytest.importorskip("timm")
    from timm.models import _efficientnet_blocks

    return _efficientnet_blocks


def se_layers():
    blocks = timm_blocks()
    return functools.partial(ek.SqueezeExcite, rd_ratio=0.25), functools.partial(blocks.SqueezeExcite, rd_ratio=0.25)


TIMM = {
    "MBConv": "InvertedResidual",
    "DepthwiseSeparableConv": "DepthwiseSeparableConv",
    "FusedMBConv": "EdgeResidual",
    "SqueezeExcite": "SqueezeExcite",
}


def case(ours, se=False, **kwargs):
    """Class, timm's class, arguments, and whether the block has squeeze-and-excitation."""
    return ours, TIMM[ours], {"in_chs": 12, **kwargs}, se


CASES = [
    case("MBConv", se=True, out_chs=12, exp_ratio=4.0, act_layer=nn.SiLU),
    case("MBConv", se=True, out_chs=20, exp_ratio=3.0, stride=2, dw_kernel_size=5),
    case("MBConv", out_chs=12, stride=2, pad_type="same", act_layer=nn.ReLU6),
    case("MBConv", out_chs=12, noskip=True, drop_path_rate=0.3),
    case("MBConv", se=True, out_chs=12, dilation=2, drop_path_rate=0.3),
    case("DepthwiseSeparableConv", se=True, out_chs=12, act_layer=nn.Hardswish),
    case("DepthwiseSeparableConv", out_chs=8, pw_act=True, stride=2),
    case("DepthwiseSeparableConv", out_chs=12, drop_path_rate=0.5),
    case("FusedMBConv", out_chs=12, exp_ratio=4.0, act_layer=nn.SiLU),
    case("FusedMBConv", out_chs=20, exp_ratio=4.0, stride=2, pad_type="same"),
    case("FusedMBConv", se=True, out_chs=12, force_in_chs=8, drop_path_rate=0.4),
    case("FusedMBConv", se=True, out_chs=20, pad_type=2, exp_kernel_size=5),
    case("SqueezeExcite", rd_ratio=0.5, act_layer=nn.SiLU),
    case("SqueezeExcite", rd_channels=3, gate_layer=nn.Hardsigmoid),
    case("SqueezeExcite", force_act_layer=nn.Hardswish, rd_round_fn=int),
]
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(CASES)]


def pair(ours, theirs, kwargs, se):
    """Our module and timm's block with the same weights."""
    our_se, their_se = se_layers()
    extra = [{"se_layer": layer} if se else {} for layer in (our_se, their_se)]
    mine = getattr(ek, ours)(**kwargs, **extra[0])
    stock = randomize(getattr(timm_blocks(), theirs)(**kwargs, **extra[1]))
    mine.load_state_dict(stock.state_dict(), strict=True)
    return mine, stock


@pytest.mark.parametrize(("ours", "theirs", "kwargs", "se"), CASES, ids=IDS)
def test_state_dict_is_timms(ours, theirs, kwargs, se):
    mine, stock = pair(ours, theirs, kwargs, se)
    assert list(mine.state_dict()) == list(stock.state_dict())
    assert [p.shape for p in mine.parameters()] == [p.shape for p in stock.parameters()]
    stock.load_state_dict(mine.state_dict(), strict=True)


@pytest.mark.parametrize(("ours", "theirs", "kwargs", "se"), CASES, ids=IDS)
@pytest.mark.parametrize("size", [(9, 12), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_eval_equals_timm(ours, theirs, kwargs, se, size, dtype, backend):
    mine, stock = (module.eval().to(dtype) for module in pair(ours, theirs, kwargs, se))
    x = images(2, 12, kwargs["in_chs"])[:, :, : size[0], : size[1]].to(dtype)
    exact = exact_output(stock, x)
    with torch.no_grad(), ek.use_backend(backend):
        y = mine(x)
        with measuring():
            assert_as_accurate(y, stock(x), exact)


@pytest.mark.parametrize(("ours", "theirs", "kwargs", "se"), CASES, ids=IDS)
def test_training_equals_timm(ours, theirs, kwargs, se):
    """Same output, gradients, running statistics and stochastic depth, bit by bit, where no kernel of ours trains."""
    mine, stock = (module.double() for module in pair(ours, theirs, kwargs, se))
    results = []
    for module in (mine, stock):
        x = images(4, 9, kwargs["in_chs"]).double().requires_grad_()
        torch.manual_seed(3)
        y = module.train()(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_depthwise_conv_bn_act(backend):
    module = randomize(ek.DepthwiseConvBNAct(10, 5, stride=2, pad_type="same", act_layer="hard_swish"))
    assert [key.split(".")[0] for key in module.state_dict()] == ["conv", *["bn"] * 5]
    x = images(2, 11, 10)
    module.eval()
    exact = exact_output(module, x)
    with torch.no_grad():
        stock = module.bn(module.conv(x))
        with ek.use_backend(backend):
            y = module(x)
    assert_as_accurate(y, stock, exact)
    assert module.train()(x).shape == (2, 10, 6, 6)


def test_eval_runs_the_op(monkeypatch):
    """The comparisons above would also pass if the modules never left plain PyTorch."""
    calls = []
    for name in ("mbconv", "fused_mbconv", "depthwise_conv_bn_act", "squeeze_excite", "squeeze_excite_gate"):
        op = getattr(fusing.F, name)
        monkeypatch.setattr(fusing.F, name, lambda *a, name=name, op=op, **k: (calls.append(name), op(*a, **k))[1])
    x = images(1, 8, 8)
    modules = [
        ek.MBConv(8, 8),
        ek.DepthwiseSeparableConv(8, 8),
        ek.FusedMBConv(8, 8, se_layer=ek.SqueezeExcite),
        ek.SqueezeExcite(8),
        ek.DepthwiseConvBNAct(8),
    ]
    with torch.no_grad(), ek.use_backend("reference"):
        for module in modules:
            module.eval()(x)
    assert calls == [
        "mbconv", "mbconv", "fused_mbconv", "squeeze_excite_gate", "squeeze_excite", "depthwise_conv_bn_act",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ek.MBConv(8, 8, act_layer=nn.GELU), "act_layer"),
        (lambda: ek.MBConv(8, 8, act_layer="mish"), "act_layer"),
        (lambda: ek.MBConv(8, 8, norm_layer=nn.GroupNorm), "norm_layer"),
        (lambda: ek.MBConv(8, 8, pad_type="full"), "pad_type"),
        (lambda: ek.MBConv(8, 8, pad_type=-1), "pad_type"),
        (lambda: ek.MBConv(8, 8, stride=0), "stride"),
        (lambda: ek.MBConv(8, 8, drop_path_rate=1.0), "drop_path_rate"),
        (lambda: ek.FusedMBConv(0, 8), "in_chs"),
        (lambda: ek.DepthwiseSeparableConv(8, 8, dilation=0), "dilation"),
        (lambda: ek.SqueezeExcite(8, gate_layer=nn.Tanh), "gate_layer"),
        (lambda: ek.SqueezeExcite(1, rd_ratio=0.25), "rd_channels"),
        (lambda: ek.DepthwiseConvBNAct(8, kernel_size=0), "kernel_size"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_norm_layer_partial_and_dtype():
    norm_layer = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    module = ek.MBConv(8, 8, norm_layer=norm_layer, dtype=torch.float64)
    assert (module.bn2.eps, module.bn2.momentum) == (1e-3, 0.01)
    assert {p.dtype for p in module.parameters()} == {torch.float64}


def test_pickle():
    module = ek.MBConv(8, 8, se_layer=ek.SqueezeExcite, pad_type="same", stride=2, drop_path_rate=0.1).eval()
    x = images(1, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


def test_neither_timm_nor_torchvision_is_needed():
    """The package imports and the modules run where both libraries are missing."""
    code = """
import sys
sys.modules["timm"] = sys.modules["torchvision"] = None
import torch, effnet_kernels as ek
for module in (ek.MBConv(8, 8, se_layer=ek.SqueezeExcite), ek.FusedMBConv(8, 8), ek.DepthwiseSeparableConv(8, 8)):
    assert module.eval()(torch.randn(1, 8, 5, 5)).shape == (1, 8, 5, 5)
try:
    ek.patch(torch.nn.Linear(1, 1))
except ValueError as error:
    assert "Linear" in str(error)
else:
    raise AssertionError("nothing to patch")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_imports_no_library():
    code = "import sys, effnet_kernels; assert not {'timm', 'torchvision', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
