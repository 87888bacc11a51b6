"""What all ops share: the library handle, output allocation, reference arithmetic, registration."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from effnet_kernels.backends import Problem, implementation
from effnet_kernels.ops.activations import FUNCTIONS

LIBRARY = torch.library.Library("effnet_kernels", "DEF")
_OPTIONAL_LIST = "Optional[List[Tensor]]"  # a type in a schema
_IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd


def conv_output_size(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Output extent of a convolution along one axis with explicit padding on both sides."""
    return (size + before + after - kernel) // stride + 1


def empty_nhwc(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Uninitialised [N, channels, height, width] in channels-last memory, like x in dtype and device.

    Fakes and kernels both allocate their output here, so strides cannot disagree.
    """
    shape = (x.shape[0], channels, height, width)
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


def to_nhwc(x: Tensor) -> Tensor:
    """x itself when its memory is dense [N, H, W, C] to the letter, else a copy that is.

    ``is_contiguous(memory_format=...)`` says yes to ambiguous strides where C, H or W is 1, so the
    strides are written out. Where an op is decomposed for export, sizes may be symbols, and a comparison would
    hold for one size only; the stock ops that follow there do not need it.
    """
    if torch.compiler.is_exporting() and type(x) not in (Tensor, torch.nn.Parameter):
        return x.contiguous(memory_format=torch.channels_last)
    _, c, h, w = x.shape
    if x.stride() == (h * w * c, 1, w * c, c):
        return x
    return empty_nhwc(x, c, h, w).copy_(x)


def wide(x: Tensor) -> Tensor:
    """x in the precision that sums and epilogues use: fp32 for 16-bit types."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def convolve(
    x: Tensor, weight: Tensor, stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0, 0, 0)
) -> Tensor:
    """The convolution of the references, padded by (top, bottom, left, right); computed and returned in ``wide``.

    Libraries' own 16-bit convolutions define nothing: oneDNN's on AMX take a NaN to pixels whose window it is not in.
    """
    top, bottom, left, right = padding
    # A symbol may be zero for one size of the image and not for the next.
    if any(type(pad) is not int or pad for pad in padding):
        x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(wide(x), wide(weight), stride=list(stride), groups=x.shape[1] // weight.shape[1])


def batch_norm_act(y: Tensor, bn: Sequence[Tensor], eps: float, act: str) -> Tensor:
    """act(bn(y)) of a ``wide`` map, from running statistics."""
    gamma, beta, mean, var = (t.to(y.dtype) for t in bn)
    return FUNCTIONS[act](F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps))


class Op:
    """One registered op. Calling it goes through the dispatcher only where the dispatcher has work to do.

    Autograd, torch.compile, export, tensor subclasses and dispatch modes need ``torch.ops``, at 70 us a
    call for an op with this many arguments. Plain inference calls the backend straight away.
    """

    def __init__(self, overload: Any, problem: Callable[..., Problem]) -> None:
        self.overload = overload
        self.problem = problem

    def __call__(self, *args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or type(args[0]) is not Tensor
            or torch._C._len_torch_dispatch_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
        ):
            return self.overload(*args)
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        """The op without the dispatcher: the last argument names the backend.

        Dtypes are settled before (``functional``), so autocast ends here: it would reach into the reference.
        """
        device = args[0].device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.run(*args)
        return implementation(self.problem(*args), args[-1])(*args[:-1])


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    problem: Callable[..., Problem],
) -> Op:
    """Define one op from its schema: kernel, fake kernel and gradient.

    The last argument of every schema is ``str backend``; ``backends`` finds the implementation that
    serves ``problem(*args)``. The gradient re-evaluates ``reference``: it needs nothing but the op's
    inputs, so inference-only kernels stay differentiable.
    """

    def run(*args: Any) -> Any:
        return op.run(*args)

    overload = define(
        schema, run=run, fake=lambda *args: fake(*args[:-1]), decomposition=lambda *args: reference(*args[:-1])
    )
    op = Op(overload, problem)
    setup_context, backward = _gradient(reference)
    torch.library.register_autograd(overload.name(), backward, setup_context=setup_context, lib=LIBRARY)
    return op


def define(schema: str, *, run: Callable[..., Any], fake: Callable[..., Any], decomposition: Callable[..., Any]) -> Any:
    """Define an op in the dispatcher by its kernel, its fake kernel and what it is in stock ops.

    All three take the arguments of the schema. The kernel is one for all devices: with one for each, export takes
    the op for a primitive and never looks for a decomposition.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    overload = getattr(torch.ops.effnet_kernels, name).default
    LIBRARY.impl(name, _with_lists(overload, run), "CompositeExplicitAutograd")
    torch.library.register_fake(overload.name(), _with_lists(overload, fake), lib=LIBRARY)
    _decompose_in_export(overload, _with_lists(overload, decomposition))
    return overload


def _with_lists(overload: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with [] in place of None, which is how AOTInductor passes an empty list."""
    positions = [i for i, argument in enumerate(overload._schema.arguments) if str(argument.type) == _OPTIONAL_LIST]

    def call(*args: Any) -> Any:
        filled = list(args)
        for i in positions:
            if filled[i] is None:
                filled[i] = []
        return function(*filled)

    return call


def _decompose_in_export(overload: Any, decomposition: Callable[..., Any]) -> None:
    """Enter ``decomposition`` where the tables of torch.export, and of converters built on them, look for it.

    Compilers look there too, but have to keep the op. Export alone has Python kernels for autograd beside the
    entry, and only while it decomposes a program by a table that has this op.
    """
    kernels = overload.py_kernels

    def entry(*args: Any) -> Any:
        if kernels.get(_IMPLICIT) is entry and torch._C.DispatchKey.AutogradCPU in kernels:
            return decomposition(*args)
        # Inductor starts from export's table, and then refuses ops in it that were kept.
        inductor = sys.modules.get("torch._inductor.decomposition")
        if inductor is not None:
            for table in (inductor.decompositions, inductor.select_decomp_table()):
                table.pop(overload, None)
        return NotImplemented

    overload.py_impl(_IMPLICIT)(entry)


def _gradient(reference: Callable[..., Any]) -> tuple[Callable[..., None], Callable[..., Any]]:
    """``setup_context`` and ``backward`` that save an op's inputs and differentiate its reference."""

    def is_leaf(argument: Any) -> bool:
        # Gradients of a tensor list come back as a list; a list of numbers is one argument.
        return isinstance(argument, list) and any(not isinstance(item, Tensor) for item in argument)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        leaves, ctx.spec = tree_flatten(inputs[:-1], is_leaf=is_leaf)
        ctx.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        tensors = iter(t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors)
        leaves = [next(tensors) if constant is None else constant[0] for constant in ctx.constants]
        with torch.enable_grad(), torch.autocast(leaves[0].device.type, enabled=False):
            outputs = reference(*tree_unflatten(leaves, ctx.spec))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(y, g) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None and y.requires_grad]
        wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        grads = torch.autograd.grad(
            [y for y, _ in pairs], [leaves[i] for i in wanted], [g for _, g in pairs], allow_unused=True
        )
        result: list[Tensor | None] = [None] * len(leaves)
        for i, grad in zip(wanted, grads, strict=True):
            result[i] = grad
        return *tree_unflatten(result, ctx.spec), None

    return setup_context, backward
