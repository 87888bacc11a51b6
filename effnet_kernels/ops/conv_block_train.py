"""``conv_block_train`` and its backward: a whole block in training as one node of autograd.

Both are functional. Running statistics are not updated here: the op returns those of the batch.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels import internals
from effnet_kernels.arguments import SqueezeExciteWeights
from effnet_kernels.dispatch import Query, implementation, place
from effnet_kernels.ops import train_block as block
from effnet_kernels.ops import train_cpu, train_cuda
from effnet_kernels.ops.common import LIBRARY, define, empty_nhwc, to_nhwc, without_autocast
from effnet_kernels.ops.train_block import Layer, NeedsInputGrad, accumulate_dtype, work
from effnet_kernels.ops.train_reference import Reference

_LAYERS = (
    # Per layer: a weight; gamma, beta, running mean and variance; the epsilon;
    # whether the running statistics normalise; the activation; stride (2) and padding (4).
    "Tensor[] weights, Tensor[] vectors, float[] eps, bool[] frozen, str[] acts, SymInt[] geometry, "
    "Tensor[]? se, str se_act, str se_gate"
)
_FORWARD = (
    f"conv_block_train(Tensor x, {_LAYERS}, Tensor? residual, bool pool, str backend) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[])"
)
# `needs_input_grad`: a bool per tensor, in the order of NeedsInputGrad; the gradients of those that are True result.
_BACKWARD = (
    "conv_block_train_backward(Tensor grad, Tensor? x, Tensor?[] raws, Tensor[] statistics, Tensor[]? squeezed, "
    f"{_LAYERS}, bool pool, SymInt[] size, bool[] needs_input_grad, str backend) -> Tensor[]"
)


class Flat(NamedTuple):
    """``_LAYERS``, what both schemas have in common: the layers, flat as a schema wants them."""

    weights: Sequence[Tensor]
    vectors: Sequence[Tensor]
    eps: Sequence[float]
    frozen: Sequence[bool]
    acts: Sequence[str]
    geometry: Sequence[int]
    se: Sequence[Tensor]
    se_act: str
    se_gate: str

    def layers(self) -> list[Layer]:
        layers = []
        for i, act in enumerate(self.acts):
            gamma, beta, mean, var = self.vectors[4 * i : 4 * i + 4]
            sh, sw, top, bottom, left, right = self.geometry[6 * i : 6 * i + 6]
            norm = gamma, beta, mean, var, self.eps[i], self.frozen[i]
            layers.append(Layer(self.weights[i], *norm, act, (sh, sw), (top, bottom, left, right)))
        return layers

    def excitation(self) -> SqueezeExciteWeights | None:
        if not self.se:
            return None
        w_reduce, b_reduce, w_expand, b_expand = self.se
        return SqueezeExciteWeights(w_reduce, b_reduce, w_expand, b_expand, self.se_act, self.se_gate)

    def parameters(self) -> tuple[Sequence[Tensor], ...]:
        """Everything that may want a gradient, in the order of ``NeedsInputGrad``."""
        return self.weights, self.vectors[::4], self.vectors[1::4], self.se

    def needs(self, flags: Sequence[bool]) -> NeedsInputGrad:
        """From one flag for x and for each of ``parameters``."""
        (x,), *others = _split(flags, [1, *map(len, self.parameters())])
        return NeedsInputGrad(x, *others)


def _split(flat: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    items = iter(flat)
    return [[next(items) for _ in range(n)] for n in lengths]


# What ``block`` computes with, by backend; that of Triton is in conv_block_train_triton.py.
reference = Reference()
cpu = train_cpu.Native()
cuda = train_cuda.Native()


def query(x: Tensor) -> Query:
    """Blocks differ in nothing that a backend is asked about."""
    return Query("conv_block_train", place(x), x.dtype)


def _run_forward(x: Tensor, *rest: Any) -> Any:
    *arguments, residual, pool, backend = rest
    flat = Flat(*arguments)
    residual = None if residual is None else to_nhwc(residual)
    kernels = implementation(query(x), backend)
    return block.forward(kernels, to_nhwc(x), flat.layers(), flat.excitation(), residual, pool)


def _run_backward(grad: Tensor, x: Tensor | None, *rest: Any) -> list[Tensor]:
    raws, statistics, squeezed, *arguments, pool, size, needs, backend = rest
    flat = Flat(*arguments)
    layers = flat.layers()
    saved = _dense(block.Saved(x, raws, statistics, squeezed), layers, size, grad)
    kernels = implementation(query(grad), backend)
    return block.backward(kernels, grad, saved, layers, flat.excitation(), pool, size, flat.needs(needs))


def _dense(saved: block.Saved, layers: Sequence[Layer], size: Sequence[int], grad: Tensor) -> block.Saved:
    """What came back from autograd, in the memory that kernels read: hooks on saved tensors may have copied it."""
    maps, wide, sizes = grad.dtype, accumulate_dtype(grad), [tuple(size)]
    for layer in layers:
        sizes.append(layer.output_size(sizes[-1]))

    def check(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if t.shape != shape or t.dtype != dtype or t.device != grad.device:
            raise RuntimeError(
                f"a tensor kept for backward must come back as {dtype} {shape} on {grad.device}: "
                f"got {t.dtype} {tuple(t.shape)} on {t.device}"
            )

    def dense(t: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        if t is None:
            return None
        check(t, shape, maps)
        return to_nhwc(t)

    raws = [dense(raw, shape) for raw, shape in zip(saved.raws, sizes[1:], strict=True)]
    statistics, squeezed = ([t.contiguous() for t in ts] for ts in (saved.statistics, saved.squeezed))
    for t, shape in zip(statistics, sizes[1:], strict=True):
        check(t, (2, shape[1]), wide)
    for t in squeezed:
        check(t, (size[0], sizes[-2][1]), wide)
    return block.Saved(dense(saved.x, sizes[0]), raws, statistics, squeezed)


def _fake_forward(x: Tensor, *rest: Any) -> Any:
    *arguments, _, pool, _ = rest
    flat = Flat(*arguments)
    size, raws, statistics, wide = tuple(x.shape), [], [], accumulate_dtype(x)
    for layer in flat.layers():
        size = layer.output_size(size)
        statistics.append(x.new_empty((2, size[1]), dtype=wide))
        raws.append(empty_nhwc(x, *size[1:]))
    squeezed = [x.new_empty((x.shape[0], flat.se[3].shape[0]), dtype=wide) for _ in range(2)] if flat.se else []
    out = x.new_empty(size[:2]) if pool else empty_nhwc(x, *size[1:])
    return out, raws, statistics, squeezed


def _fake_backward(grad: Tensor, x: Tensor | None, *rest: Any) -> list[Tensor]:
    _, _, _, *arguments, _, size, needs, _ = rest
    dx = [empty_nhwc(grad.new_empty((size[0],)), *size[1:])] if needs[0] else []
    parameters = itertools.chain(*Flat(*arguments).parameters())
    return dx + [t.new_empty(t.shape) for t, wanted in zip(parameters, needs[1:], strict=True) if wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, *arguments, residual, pool, backend = inputs
    _, raws, statistics, squeezed = output
    flat = Flat(*arguments)
    parameters = flat.parameters()
    flags = [t.requires_grad for t in itertools.chain([x], *parameters)]
    todo = work(flat.layers(), flat.needs(flags), bool(flat.se), pool)
    raws = [raw if keep else None for raw, keep in zip(raws, todo.raws, strict=True)]
    saved = [[x if todo.x else None], raws, statistics, squeezed, *parameters]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*itertools.chain(*saved))
    ctx.lengths = [len(tensors) for tensors in saved]
    ctx.flat = flat._replace(weights=(), vectors=(), se=())
    ctx.rest = (pool, list(x.shape), flags, backend)
    ctx.residual = residual is not None and residual.requires_grad


def _setup_context_of_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, raws, statistics, squeezed = output
    ctx.mark_non_differentiable(*raws, *statistics, *squeezed)
    _setup_context(ctx, inputs, output)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    """Of x, weights, vectors, squeeze-and-excitation and the residual; None where none is wanted."""
    (x,), raws, statistics, squeezed, weights, gammas, betas, se = _split(ctx.saved_tensors, ctx.lengths)
    (*_, flags, _), found = ctx.rest, iter(())
    if grad is None:
        flags = [False] * len(flags)
    elif any(flags):
        # Running statistics may have moved on; those that were used are in ``statistics``.
        vectors = [v for four in zip(gammas, betas, gammas, betas, strict=True) for v in four]
        flat = ctx.flat._replace(weights=weights, vectors=vectors, se=se)
        if torch.is_grad_enabled() or internals.batched(grad):
            found = iter(without_autocast(grad, _by_reference, grad, x, statistics, flat, *ctx.rest))
        else:
            run = backward_op if _needs_dispatcher(grad) else functools.partial(without_autocast, grad, _run_backward)
            found = iter(run(grad, x, raws, statistics, squeezed, *flat, *ctx.rest))
    gradients = [next(found) if flag else None for flag in flags]
    (dx,), dweights, dgammas, dbetas, dse = _split(gradients, [1, *ctx.lengths[4:]])
    dvectors = [v for pair in zip(dgammas, dbetas, strict=True) for v in (*pair, None, None)]
    return dx, dweights, dvectors, dse, grad if ctx.residual else None


def _by_reference(
    grad: Tensor, x: Tensor, statistics: Sequence[Tensor], flat: Flat, pool: bool, size: Sequence[int],
    flags: Sequence[bool], backend: str,
) -> Sequence[Tensor]:  # fmt: skip
    """The wanted gradients by autograd and torch's own ops, where they will be differentiated or come in batches."""
    again, tensors = torch.is_grad_enabled(), [x, *itertools.chain(*flat.parameters())]
    with torch.enable_grad():
        # Other tensors of the same value: an argument may come twice, or be made from another one.
        tensors = [t.view_as(t) if wanted else t for t, wanted in zip(tensors, flags, strict=True)]
        (x,), weights, gammas, betas, se = _split(tensors, [1, *map(len, flat.parameters())])
        vectors = [v for gamma, beta, used in zip(gammas, betas, statistics, strict=True) for v in (gamma, beta, *used)]
        flat = flat._replace(weights=weights, vectors=vectors, se=se)
        out, *_ = block.forward(reference, to_nhwc(x), flat.layers(), flat.excitation(), None, pool)
    wanted = [t for t, flag in zip(tensors, flags, strict=True) if flag]
    return torch.autograd.grad(out, wanted, grad, create_graph=again)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
    dx, dweights, dvectors, dse, dresidual = _gradients(ctx, grad)
    return dx, dweights, dvectors, None, None, None, None, dse, None, None, dresidual, None, None


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    return define(
        schema,
        run=lambda x, *args: without_autocast(x, run, x, *args),
        fake=fake,
        decomposition=lambda *args: run(*args[:-1], "reference"),
    )


def _needs_dispatcher(x: Tensor) -> bool:
    """Whether somebody traces, transforms or watches the ops of this call."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or internals.dispatched()


class _Direct(torch.autograd.Function):
    """The op without the dispatcher, which takes longer over lists of tensors than a small block over its maps."""

    @staticmethod
    def forward(ctx: Any, arguments: tuple[Any, ...], *_: Tensor | None) -> Any:
        output = without_autocast(arguments[0], _run_forward, *arguments)
        _setup_context(ctx, arguments, output)
        ctx.mark_non_differentiable(*output[2])
        return output[0], *output[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        dx, dweights, dvectors, dse, dresidual = _gradients(ctx, grad)
        return None, dx, *dweights, *dvectors, *dse, dresidual


def conv_block_train(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The op (its schema is above): the output, and [2, C] statistics per layer."""
    x, *layers, residual, _, _ = arguments
    flat = Flat(*layers)
    if _needs_dispatcher(x):
        out, _, statistics, _ = op(*arguments)
    elif torch.is_grad_enabled():
        out, *statistics = _Direct.apply(arguments, x, *flat.weights, *flat.vectors, *flat.se, residual)
    else:
        out, _, statistics, _ = without_autocast(x, _run_forward, *arguments)
    return out, statistics


op = _define(_FORWARD, _run_forward, _fake_forward)
backward_op = _define(_BACKWARD, _run_backward, _fake_backward)
torch.library.register_autograd(
    "effnet_kernels::conv_block_train", _backward, setup_context=_setup_context_of_op, lib=LIBRARY
)
