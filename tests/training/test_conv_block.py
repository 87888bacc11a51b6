"""Blocks in training: gradients against float64, and what an op has to keep to."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from effnet_kernels.functional import BatchNorm
from effnet_kernels.training import ConvBNAct, conv_block
from tests.ops.special_values import lost_convolutions
from tests.thinning import in_turns
from tests.training.blocks import (
    CASES,
    BlockProblem,
    Case,
    assert_as_accurate,
    assert_memory_does_not_matter,
    batch_norm_act,
    build,
    cells,
)


@pytest.mark.parametrize(("case", "dtype"), cells(CASES, [torch.float32, torch.bfloat16]))
@pytest.mark.usefixtures("poison")
def test_gradients(case, dtype, backend):
    assert_as_accurate(build(case, dtype), dtype, backend)


@pytest.mark.parametrize(("case", "dtype"), cells(CASES, [torch.float16]))
def test_gradients_in_half_precision(case, dtype):
    assert_as_accurate(build(case, dtype), dtype, "reference")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_in_double(case):
    """Both sides are right to 2^-53 times the number of terms, at most 1e-12; a wrong term shows at once."""
    problem = build(case).to(torch.float64, torch.float64)
    for got, expected in zip(problem.run("reference"), problem.stock(), strict=True):
        assert (got - expected).abs().max() <= 1e-9 * max(expected.abs().max(), 1e-3)


SMALL = [
    Case(widths=(2, 3, 3, 2), hw=(4, 3), se=True, residual=True),
    Case(kinds="f", widths=(2, 3), hw=(4, 3), pool=True, last_act="silu"),
    Case(kinds="p", widths=(2, 2), hw=(3, 3), last_act="silu"),
]


def function(problem: BlockProblem, backend: str = "auto", frozen: bool = False):
    """The block as a function of its leaves."""

    def call(*leaves):
        it = iter(leaves)
        x = next(it)
        residual = None if problem.residual is None else next(it)
        layers = [
            layer._replace(
                weight=None if layer.weight is None else next(it),
                bn=BatchNorm(next(it), next(it), *layer.bn[2:]),
                frozen=frozen,
            )
            for layer in problem.layers
        ]
        se = None if problem.se is None else problem.se._replace(**dict(zip(problem.se._fields[:4], it, strict=False)))
        return conv_block(x, layers, se, residual=residual, pool=problem.pool, backend=backend)[0]

    return call


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case, frozen):
    problem = build(case).to(torch.float64, torch.float64)
    assert torch.autograd.gradcheck(function(problem, frozen=frozen), problem.leaves())


@in_turns("case, frozen", SMALL, [False, True])
def test_second_derivatives(case, frozen):
    """Of everything, and where only x or only the last layer wants gradients."""
    problem = build(case).to(torch.float64, torch.float64)
    leaves = problem.leaves()
    for wanted in (range(len(leaves)), [0], [len(leaves) - 1]):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in wanted)
        assert torch.autograd.gradgradcheck(function(problem, frozen=frozen), leaves)


def test_second_derivatives_of_every_backend(backend):
    """And of one parameter in two places, and of a weight that is made from the input."""
    problem = build(Case(se=True)).to(torch.float32, torch.float32)
    shared, made = problem.layers[0].bn.gamma, problem.x.mean() * problem.layers[-1].weight
    layers = [problem.layers[0], problem.layers[1], problem.layers[2]._replace(weight=made)]
    layers[1] = layers[1]._replace(bn=layers[1].bn._replace(gamma=shared))

    def second(backend):
        y, _ = conv_block(problem.x, layers, problem.se, backend=backend)
        grads = torch.autograd.grad(y.square().sum(), (problem.x, shared), create_graph=True)
        leaves = problem.x, shared, problem.layers[2].weight
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, retain_graph=True)

    for got, expected in zip(second(backend), second("reference"), strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
def test_gradients_in_batches(frozen, backend):
    """``jacobian(vectorize=True)`` hands over all rows at once."""
    problem = build(Case(se=True)).to(torch.float32, torch.float32)
    call = function(problem, backend, frozen)
    _, *rest = problem.leaves()

    def few(x):
        return call(x, *rest).flatten()[::61]

    one, all_at_once = (torch.autograd.functional.jacobian(few, problem.x, vectorize=how) for how in (False, True))
    assert (one - all_at_once).abs().max() <= 1e-4 * one.abs().max()


@pytest.mark.parametrize("case", [*SMALL, Case(se=True)], ids=str)
def test_saved_tensors_may_come_back_in_other_memory(case, backend):
    assert_memory_does_not_matter(build(case).to(torch.float32, torch.float32), backend)


@pytest.mark.parametrize(
    "change", [lambda t: t.double(), lambda t: t[..., :-1] if t.dim() else t], ids=["dtype", "shape"]
)
def test_saved_tensors_that_are_others_are_refused(change, backend):
    problem = build(Case()).to(torch.float32, torch.float32)
    with saved_tensors_hooks(lambda t: t, change):
        y = problem.forward(backend)
    with pytest.raises(RuntimeError, match="kept for backward"):
        y.sum().backward()


def subset(problem: BlockProblem, wanted: list[int], backend: str) -> None:
    """The gradients of some leaves alone are the same as all of them together."""
    everything = problem.run(backend)[1:]
    for i, leaf in enumerate(problem.leaves()):
        leaf.requires_grad_(i in wanted)
    y, _ = conv_block(problem.x, problem.layers, problem.se, residual=problem.residual, backend=backend)
    some = torch.autograd.grad(y, [problem.leaves()[i] for i in wanted], problem.grad)
    for i, grad in zip(wanted, some, strict=True):
        torch.testing.assert_close(grad, everything[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["", "012", "02"])
def test_any_single_gradient(frozen, backend):
    """Each leaf on its own: what only the others need is neither kept nor computed, and nothing is missing."""
    case = Case(se=True, residual=True, widths=(5, 17, 17, 5), frozen=frozen)
    for i in range(len(build(case).leaves())):
        subset(build(case).to(torch.float32, torch.float32), [i], backend)


@pytest.mark.parametrize("layout", ["nchw", "expanded", "sliced"])
def test_gradients_of_any_layout(layout, backend):
    problem = build(Case(se=True)).to(torch.float32, torch.float32)
    grad = problem.grad
    if layout == "expanded":
        grad = grad[:, :, :1, :1].expand(grad.shape)
    if layout == "sliced":
        grad = torch.stack([grad, grad], -1)[..., 0]
    assert not grad.is_contiguous(memory_format=torch.channels_last)
    y, _ = conv_block(problem.x, problem.layers, problem.se, backend=backend)
    dense = torch.empty_like(y).copy_(grad)
    got = torch.autograd.grad(y, problem.leaves(), grad, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(y, problem.leaves(), dense), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_a_wrong_shape_are_refused(backend):
    """Autograd names both shapes before any kernel runs."""
    problem = build(Case(se=True)).to(torch.float32, torch.float32)
    y, _ = conv_block(problem.x, problem.layers, problem.se, backend=backend)
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        torch.autograd.grad(y, problem.leaves(), problem.grad[:, :, 1:])


def test_inputs_of_any_layout(backend):
    problem = build(Case(se=True)).to(torch.float32, torch.float32)
    expected = problem.run(backend)
    problem.x = torch.stack([problem.x, problem.x], -1).detach()[..., 1].requires_grad_()
    assert all(torch.equal(a, b) for a, b in zip(problem.run(backend), expected, strict=True))


def test_the_same_bits_for_any_number_of_threads(cpu_build):
    """Matrix products are torch's own, so a depthwise block without them."""
    problem = build(Case(kinds="d", widths=(70, 70), n=3, hw=(33, 40), last_act="silu"), torch.float32)
    problem = problem.to(torch.float32, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(problem.run(cpu_build))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("act", ["relu", "relu6", "silu", "hardswish"])
def test_derivatives_at_kinks_and_far_out(act, backend):
    """Frozen unit statistics leave the map as it is; at the kinks the choice is torch's own."""
    x = torch.tensor([-200.0, -90.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0, 90.0, 200.0]).repeat(17).view(1, 11, 17, 1)
    x = x.requires_grad_()
    ones, zeros = torch.ones(11), torch.zeros(11)
    y, _ = batch_norm_act(x, BatchNorm(ones, zeros, zeros, ones, 0.0), act, frozen=True, backend=backend)
    (got,) = torch.autograd.grad(y.sum(), x)
    functions = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
    (expected,) = torch.autograd.grad(functions[act](x).sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_statistics_far_from_zero(offset, backend):
    """A variance by mean of squares minus square of mean would be noise here."""
    x = torch.randn(4, 9, 20, 21, generator=torch.Generator().manual_seed(0)) + offset
    bn = BatchNorm(*(torch.ones(9), torch.zeros(9), torch.zeros(9), torch.ones(9)))
    _, statistics = batch_norm_act(x, bn, backend=backend)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(statistics.double(), torch.stack([mean, var]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", [Case(se=True), Case(kinds="fp", widths=(5, 18, 7), se=True)], ids=str)
def test_convolutions_of_16_bits_define_nothing(case):
    """The reference is as accurate without them."""
    with lost_convolutions():
        assert_as_accurate(build(case, torch.bfloat16), torch.bfloat16, "reference")


def test_large_activations_in_half_precision():
    """Finite wherever float32 is."""
    case = Case(se=True, scale=1e4)
    for dtype in (torch.float32, torch.float16):
        results = build(case, torch.float16).to(dtype, torch.float32).run("reference")
        assert all(torch.isfinite(t).all() for t in results), dtype


def test_one_value_per_channel_is_torchs_error(backend):
    bn = BatchNorm(*torch.ones(4, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as ours:
        batch_norm_act(torch.ones(1, 3, 1, 1), bn, backend=backend)
    with pytest.raises(ValueError, match="Expected more than 1 value") as torchs:
        F.batch_norm(torch.ones(1, 3, 1, 1), None, None, training=True)
    assert str(ours.value) == str(torchs.value)


def bad_calls():
    x, bn = torch.randn(2, 3, 5, 5), BatchNorm(*torch.ones(4, 3))
    layer = ConvBNAct(torch.randn(3, 3, 1, 1), bn)
    se = build(Case(se=True)).to(torch.float32, torch.float32).se
    return {
        "layers must not be empty": lambda: conv_block(x, []),
        r"layers\[1\].weight must have shape \[\*, 3": lambda: conv_block(
            x, [layer, layer._replace(weight=torch.randn(3, 4, 1, 1))]
        ),
        r"layers\[0\].act must be one of": lambda: conv_block(x, [layer._replace(act="gelu")]),
        r"layers\[0\].bn.gamma must have shape": lambda: conv_block(
            x, [layer._replace(bn=bn._replace(gamma=torch.ones(4)))]
        ),
        "se needs a layer in front": lambda: conv_block(x, [layer], se),
        "pool and residual": lambda: conv_block(x, [layer], pool=True, residual=x),
        "residual must have shape": lambda: conv_block(x, [layer], residual=x[:, :, 1:]),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_arguments(message):
    with pytest.raises(ValueError, match=message):
        bad_calls()[message]()


def test_a_change_of_what_was_kept_is_an_error(backend):
    problem = build(Case(se=True)).to(torch.float32, torch.float32)
    problem.x = problem.x.contiguous(memory_format=torch.channels_last)  # kept as it is, not as a copy
    for change in (problem.x, problem.layers[0].weight, problem.layers[2].weight, problem.se.w_expand):
        y, _ = conv_block(problem.x, problem.layers, problem.se, backend=backend)
        with torch.no_grad():
            change.mul_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


REGISTERED = [Case(se=True, residual=True, widths=(5, 17, 17, 5)), Case(kinds="p", widths=(4, 6), pool=True)]


@pytest.mark.parametrize("case", REGISTERED, ids=str)
def test_registration(case, backend):
    problem = build(case).to(torch.float32, torch.float32)
    op = torch.ops.effnet_kernels.conv_block_train.default
    args = (
        problem.x.detach().to(memory_format=torch.channels_last).requires_grad_(),
        [layer.weight for layer in problem.layers],
        [v for layer in problem.layers for v in layer.bn[:4]],
        [layer.bn.eps for layer in problem.layers],
        [False] * len(problem.layers),
        [layer.act for layer in problem.layers],
        [g for layer in problem.layers for pair in layer.geometry([2, 5, 7, 6]) for g in pair],
        [] if problem.se is None else list(problem.se[:4]), "silu", "sigmoid",
        problem.residual, problem.pool, backend,
    )  # fmt: skip
    torch.library.opcheck(op, args)
