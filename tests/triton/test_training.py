"""Blocks in training on the Triton kernels: the criterion of tests/training, on maps that an interpreter can bear."""

import copy

import pytest
import torch

import effnet_kernels as ek
from effnet_kernels.functional import BatchNorm
from effnet_kernels.ops.common import to_nhwc
from tests.models import images, randomize
from tests.ops.device import DEVICE
from tests.thinning import daily
from tests.training.blocks import Case, assert_as_accurate, assert_memory_does_not_matter, batch_norm_act, build
from tests.training.test_models import assert_as_accurate_as_stock
from tests.whole_models import narrow

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    (Case(se=True, residual=True, widths=(5, 17, 17, 5), hw=(5, 3)), torch.float32),
    (Case(se=True, n=1, kernel=(5, 5), padding=(2, 2, 2, 2), hw=(1, 3)), torch.float16),
    (Case(kernel=(5, 5), stride=2, padding=(1, 2, 1, 2), hw=(5, 8), act="relu"), torch.float32),
    (Case(kernel=(3, 5), stride=3, padding=(0, 2, 2, 1), hw=(8, 7)), torch.bfloat16),
    (Case(n=1, stride=2, hw=(5, 6), padding=(0, 1, 0, 1)), torch.float16),
    (Case(kinds="dp", widths=(17, 17, 9), se=True, frozen="0", last_act="relu6", hw=(4, 3)), torch.float32),
    (Case(se=True, frozen="12", widths=(4, 18, 18, 3), hw=(4, 3)), torch.bfloat16),
    (Case(kinds="pd", widths=(5, 18, 18), se=True, hw=(3, 4)), torch.float32),
    (Case(kinds="d", widths=(18, 18), kernel=(1, 2), padding=(0, 0, 0, 1), stride=2), torch.float16),
    (Case(kinds="d", widths=(33, 33), n=1, hw=(5, 18), last_act="hardswish"), torch.float32),
    (Case(kinds="fp", widths=(5, 18, 7), act="hardswish", se=True), torch.float32),
    (Case(kinds="p", widths=(8, 40), last_act="silu", pool=True), torch.bfloat16),
    (Case(kinds="p", widths=(19, 19), last_act="silu", residual=True, hw=(12, 13)), torch.float16),
    (Case(kinds="p", widths=(70, 70), last_act="silu", frozen="0"), torch.float32),
]
DEPTHWISE = Case(kinds="d", widths=(18, 18), hw=(5, 3))


@pytest.mark.parametrize(("case", "dtype"), daily(CASES, CASES[::2]))
@pytest.mark.usefixtures("poison")
def test_gradients(case, dtype):
    assert_as_accurate(build(case, dtype), dtype, "triton")


@pytest.mark.parametrize("case", daily([DEPTHWISE, CASES[0][0], CASES[10][0]], [DEPTHWISE]))
def test_saved_tensors_may_come_back_in_other_memory(case):
    assert_memory_does_not_matter(build(case).to(torch.float32, torch.float32).on_device(), "triton")


@pytest.mark.parametrize("act", ["identity", "relu", "relu6", "silu", "hardswish"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_derivatives_at_kinks_and_far_out(act, dtype):
    """Frozen unit statistics leave the map as it is; the derivative is torch's own, at the kinks too.

    At -90 and -88.5 the derivative of SiLU is a normal float32, though sigmoid is not.
    """
    x = torch.tensor([-200.0, -90.0, -88.5, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0, 90.0, 200.0])
    x = x.repeat(17).view(1, 12, 17, 1).to(DEVICE, dtype).requires_grad_()
    ones, zeros = torch.ones(12, device=DEVICE), torch.zeros(12, device=DEVICE)
    y, _ = batch_norm_act(x, BatchNorm(ones, zeros, zeros, ones, 0.0), act, frozen=True, backend="triton")
    (got,) = torch.autograd.grad(y.sum(), x)
    functions = {"identity": torch.clone, **{name: getattr(torch.nn.functional, name) for name in (
        "relu", "relu6", "silu", "hardswish")}}  # fmt: skip
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(functions[act](exact).sum(), exact)
    finfo = torch.finfo(dtype)
    atol = finfo.tiny if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(got, expected.to(dtype), rtol=max(1e-5, 2 * finfo.eps), atol=atol)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("first", [0.0, 1e3], ids=["", "outlier"])
def test_statistics(offset, first):
    """Where values lie far from zero, or the first of a strip far from the others."""
    from effnet_kernels.ops import train_maps_triton as triton_maps

    x = torch.randn(4, 9, 20, 21, generator=torch.Generator().manual_seed(0)) + offset
    x[:, :, 0, 0] += first
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    got = triton_maps.statistics(to_nhwc(x.to(DEVICE))).cpu().double()
    torch.testing.assert_close(got[1], var, rtol=1e-5, atol=0)
    # Of the mean, what BatchNorm subtracts: to 1e-5 standard deviations and a rounding.
    assert ((got[0] - mean).abs() <= 1e-5 * var.sqrt() + 2**-24 * mean.abs()).all()


def test_many_parts_are_put_together_in_levels():
    from effnet_kernels.ops.train_parts_triton import add_up, merge

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 50, 3, generator=generator) + 100  # parts, values, channels
    mean = values.mean(1)
    squares = (values - mean[:, None]).square().sum(1)
    parts = torch.stack([torch.full_like(mean, 50.0), values[:, 0], mean - values[:, 0], squares], 1)
    var, mean = torch.var_mean(values.double(), (0, 1), correction=0)
    torch.testing.assert_close(merge(parts.to(DEVICE)).cpu().double(), torch.stack([mean, var]), rtol=1e-5, atol=0)
    sums = torch.randn(2, 300, 5, 7, generator=generator)
    got = add_up(sums.to(DEVICE), 0.5).cpu()
    torch.testing.assert_close(got, sums.double().sum(1).mul(0.5).float(), rtol=1e-5, atol=1e-5)


def test_two_runs_give_the_same_bits():
    case = Case(se=True, residual=True, widths=(5, 17, 17, 5), hw=(6, 5))
    problem = build(case).to(torch.float32, torch.float32)
    for first, second in zip(problem.run("triton"), problem.run("triton"), strict=True):
        assert torch.equal(first, second)


def test_large_activations_in_half_precision():
    """Finite wherever float32 is."""
    case = Case(se=True, scale=1e4, hw=(4, 3))
    for dtype in (torch.float32, torch.float16):
        results = build(case, torch.float16).to(dtype, torch.float32).run("triton")
        assert all(torch.isfinite(t).all() for t in results), dtype


def test_a_bias_of_any_layout():
    """The gradient behind a pooled map comes as it comes: here as one number, and transposed."""
    problem = build(Case(kinds="p", widths=(8, 5), last_act="silu", pool=True)).to(torch.float32, torch.float32)
    for grad in (problem.grad[:1, :1].expand(problem.grad.shape), problem.grad.t().contiguous().t()):
        problem.grad = grad
        got = problem.run("triton")
        for a, b in zip(got, problem.run("reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="stock and exact gradients are computed on the CPU")
def test_a_step_of_a_narrow_model():
    torch.manual_seed(0)
    stages = ["ds_r1_k3_s1_e1_c8_se0.25", "ir_r1_k5_s2_e2_c8_se0.25"]
    model = randomize(narrow(stages, num_classes=3, num_features=16)).train()
    twin = ek.patch(copy.deepcopy(model), backend="triton")
    assert len(ek.report(twin).patched) == 4  # stem, two blocks, head
    assert_as_accurate_as_stock(model, twin, images(2, 12))
