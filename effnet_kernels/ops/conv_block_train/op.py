"""``conv_block_train`` and its backward: a whole block in training as one node of autograd.

Both are functional. Running statistics are not updated here: the op returns those of the batch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.backends import Problem, implementation
from effnet_kernels.ops.common import LIBRARY, empty_nhwc, to_nhwc
from effnet_kernels.ops.conv_block_train import block
from effnet_kernels.ops.conv_block_train.layers import Needs, SqueezeExcite, decode, wide_dtype, work

_LAYERS = (
    # Per layer: a weight (none at all for a single BatchNorm); gamma, beta, running mean and variance; the epsilon;
    # whether the running statistics normalise; the activation; stride (2) and padding (4).
    "Tensor[] weights, Tensor[] vectors, float[] eps, bool[] frozen, str[] acts, SymInt[] geometry, "
    "Tensor[] se, str se_act, str se_gate"
)
_FORWARD = (
    f"conv_block_train(Tensor x, {_LAYERS}, Tensor? residual, bool pool, str backend) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[])"
)
# `needs`: one bool per tensor, in the order of layers.Needs; the result has the gradients of those that are True.
_BACKWARD = (
    "conv_block_train_backward(Tensor grad, Tensor? x, Tensor?[] raws, Tensor[] statistics, Tensor[] squeezed, "
    f"{_LAYERS}, bool pool, SymInt[] size, bool[] needs, str backend) -> Tensor[]"
)


def problem(x: Tensor) -> Problem:
    """Blocks differ in nothing that a backend is asked about."""
    return Problem("conv_block_train", x.device.type, x.dtype)


def _split(needs: Sequence[bool], layers: int, convolutions: int, se: int) -> Needs:
    """``Needs`` from the flat list."""
    flags = iter(needs)

    def take(n: int) -> list[bool]:
        return [next(flags) for _ in range(n)]

    (x,), weights, gammas, betas = take(1), take(convolutions), take(layers), take(layers)
    return Needs(x, weights or [False], gammas, betas, take(se))


def _excitation(se: Sequence[Tensor], act: str, gate: str) -> SqueezeExcite | None:
    return SqueezeExcite(se, act, gate) if se else None


def _run_forward(x, weights, vectors, eps, frozen, acts, geometry, se, se_act, se_gate, residual, pool, backend):  # type: ignore[no-untyped-def]
    layers = decode(weights, vectors, eps, frozen, acts, geometry)
    run = implementation(problem(x), backend)
    residual = None if residual is None else to_nhwc(residual)
    return run(block.forward, to_nhwc(x), layers, _excitation(se, se_act, se_gate), residual, pool)


def _run_backward(  # type: ignore[no-untyped-def]
    grad, x, raws, statistics, squeezed, weights, vectors, eps, frozen, acts, geometry, se, se_act, se_gate,
    pool, size, needs, backend,
):  # fmt: skip
    layers = decode(weights, vectors, eps, frozen, acts, geometry)
    x = None if x is None else to_nhwc(x)
    return implementation(problem(grad), backend)(
        block.backward, grad, x, raws, statistics, squeezed, layers, _excitation(se, se_act, se_gate), pool, size,
        _split(needs, len(layers), len(weights), len(se)),
    )  # fmt: skip


def _fake_forward(x, weights, vectors, eps, frozen, acts, geometry, se, se_act, se_gate, residual, pool, backend):  # type: ignore[no-untyped-def]
    size, raws, wide = x.shape, [], wide_dtype(x)
    for layer in decode(weights, vectors, eps, frozen, acts, geometry):
        size = layer.output_size(size)
        if layer.weight is not None:
            raws.append(empty_nhwc(x, *size[1:]))
    statistics = [v.new_empty((2, v.shape[0]), dtype=wide) for v in vectors[::4]]
    squeezed = [x.new_empty((x.shape[0], se[3].shape[0]), dtype=wide) for _ in range(2)] if se else []
    out = x.new_empty(size[:2]) if pool else empty_nhwc(x, *size[1:])
    return out, raws, statistics, squeezed


def _fake_backward(  # type: ignore[no-untyped-def]
    grad, x, raws, statistics, squeezed, weights, vectors, eps, frozen, acts, geometry, se, se_act, se_gate,
    pool, size, needs, backend,
):  # fmt: skip
    wanted = _split(needs, len(acts), len(weights), len(se))
    like = [
        (wanted.weights if weights else [], weights),
        (wanted.gammas, vectors[::4]),
        (wanted.betas, vectors[1::4]),
        (wanted.se, se),
    ]
    dx = [empty_nhwc(grad.new_empty((size[0],)), *size[1:])] if wanted.x else []
    return dx + [
        t.new_empty(t.shape) for flags, tensors in like for flag, t in zip(flags, tensors, strict=True) if flag
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weights, vectors, eps, frozen, acts, geometry, se, se_act, se_gate, residual, pool, backend = inputs
    _, raws, statistics, squeezed = output
    ctx.set_materialize_grads(False)
    tensors = [x, *weights, *vectors[::4], *vectors[1::4], *se]
    flags = [t.requires_grad for t in tensors]
    needs = _split(flags, len(acts), len(weights), len(se))
    layers = decode(weights, vectors, eps, frozen, acts, geometry)
    todo = work(layers, needs, bool(se), pool)
    # Parameters cost nothing to keep, but a weight cast for this call does: only those that backward goes through.
    through = [w if keep else w.new_empty(()).expand(w.shape) for w, keep in zip(weights, todo.below, strict=False)]
    ctx.save_for_backward(
        x if todo.x else None,
        *(raw if keep else None for raw, keep in zip(raws, todo.raws, strict=False)),
        *statistics, *squeezed, *through, *vectors[::4], *vectors[1::4], *se,
    )  # fmt: skip
    ctx.lengths = (1, len(raws), len(acts), len(squeezed), len(weights), len(acts), len(acts), len(se))
    ctx.residual = residual is not None and residual.requires_grad
    ctx.arguments = (eps, frozen, acts, geometry, se_act, se_gate, pool, list(x.shape), flags, backend)


def _setup_context_of_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, raws, statistics, squeezed = output
    ctx.mark_non_differentiable(*raws, *statistics, *squeezed)
    _setup_context(ctx, inputs, output)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
    eps, frozen, acts, geometry, se_act, se_gate, pool, size, flags, backend = ctx.arguments
    saved = iter(ctx.saved_tensors)
    (x,), raws, statistics, squeezed, weights, gammas, betas, se = [
        [next(saved) for _ in range(n)] for n in ctx.lengths
    ]
    # Running statistics may have moved on; those that were used are in ``statistics``.
    vectors = [v for four in zip(gammas, betas, gammas, betas, strict=True) for v in four]
    if grad is None or not any(flags):
        found: Any = iter(())
        flags = [False] * len(flags)
    else:
        arguments = (
            grad, x, raws, statistics, squeezed, weights, vectors, eps, frozen, acts, geometry,
            se, se_act, se_gate, pool, size, flags, backend,
        )  # fmt: skip
        if torch.is_grad_enabled() or _needs_dispatcher(grad):
            found = iter(backward_op(*arguments))
        else:
            found = iter(_without_autocast(_run_backward, *arguments))
    wanted = iter(flags)

    def take(n: int) -> list[Tensor | None]:
        return [next(found) if next(wanted) else None for _ in range(n)]

    (dx,), dweights, dgammas, dbetas, dse = take(1), take(len(weights)), take(len(acts)), take(len(acts)), take(len(se))
    dvectors: list[Tensor | None] = []
    for dgamma, dbeta in zip(dgammas, dbetas, strict=True):
        dvectors += [dgamma, dbeta, None, None]
    dresidual = grad if ctx.residual else None
    return dx, dweights, dvectors, None, None, None, None, dse, None, None, dresidual, None, None


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "a fused block in training has no second derivatives: unpatch the model, or put its BatchNorms in eval mode"
    )


def _without_autocast(run: Callable[..., Any], *args: Any) -> Any:
    """Dtypes are settled before (``training``): autocast would reach into the kernels."""
    device = args[0].device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return run(*args)
    return run(*args)


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, functools.partial(_without_autocast, run), key)
    torch.library.register_fake(f"effnet_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.effnet_kernels, name).default


def _needs_dispatcher(x: Tensor) -> bool:
    """Whether somebody traces, transforms or watches the ops of this call."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or bool(torch._C._len_torch_dispatch_stack())
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class _Direct(torch.autograd.Function):
    """The op without the dispatcher, which takes longer over lists of tensors than a small block over its maps."""

    @staticmethod
    def forward(ctx: Any, arguments: tuple[Any, ...], *_: Tensor | None) -> Any:
        output = _without_autocast(_run_forward, *arguments)
        _setup_context(ctx, arguments, output)
        ctx.mark_non_differentiable(*output[2])
        return output[0], *output[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        dx, dweights, dvectors, *rest = _backward(ctx, grad)
        return None, dx, *dweights, *dvectors, *rest[4], rest[7]


def conv_block_train(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The op (its schema is above): the output, and [2, C] statistics per layer."""
    x, weights, vectors, *_, se, _, _, residual, _, _ = arguments
    if _needs_dispatcher(x):
        out, _, statistics, _ = op(*arguments)
    elif torch.is_grad_enabled():
        out, *statistics = _Direct.apply(arguments, x, *weights, *vectors, *se, residual)
    else:
        out, _, statistics, _ = _without_autocast(_run_forward, *arguments)
    return out, statistics


op = _define(_FORWARD, _run_forward, _fake_forward)
backward_op = _define(_BACKWARD, _run_backward, _fake_backward)
torch.library.register_autograd(
    "effnet_kernels::conv_block_train", _backward, setup_context=_setup_context_of_op, lib=LIBRARY
)
torch.library.register_autograd("effnet_kernels::conv_block_train_backward", _no_second_derivative, lib=LIBRARY)
