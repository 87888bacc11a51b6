"""What all ops share: the library handle, output allocation, reference arithmetic, registration."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels import internals
from effnet_kernels.dispatch import Query, implementation, place
from effnet_kernels.ops.activations import FUNCTIONS

LIBRARY = torch.library.Library("effnet_kernels", "DEF")


def supports(query: Query) -> tuple[bool, str]:
    """The references serve every problem."""
    return True, "any problem"


def conv_output_size(
    size: Sequence[int], weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """(OH, OW) of a convolution of [N, C, H, W], padded by (top, bottom, left, right)."""
    (_, _, h, w), (_, _, kh, kw), (top, bottom, left, right) = size, weight.shape, padding
    return (h + top + bottom - kh) // stride[0] + 1, (w + left + right - kw) // stride[1] + 1


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


# The meta device, for one, has none, and asking whether it is on there is an error.
_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a convolution of x; None where it leaves it alone."""
    device = x.device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor, run: Callable[..., Any], *args: Any) -> Any:
    """``run(*args)``: dtypes are settled before, and autocast of x's device would reach into the references."""
    device = x.device.type
    if device in _AUTOCAST and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return run(*args)
    return run(*args)


class Op:
    """One registered op. Calling it goes through the dispatcher only where the dispatcher has work to do.

    Autograd, torch.compile, export, tensor subclasses and dispatch modes need ``torch.ops``, at 70 us a
    call for an op with this many arguments. Plain inference calls the backend straight away.
    """

    def __init__(self, name: str, arguments: Sequence[str], overload: Any) -> None:
        self.name, self.overload = name, overload
        self._windowed = "stride" in arguments
        if self._windowed:
            self._weight, self._stride = arguments.index("weight"), arguments.index("stride")

    def __call__(self, *args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or type(args[0]) is not Tensor
            or internals.dispatched()
        ):
            return self.overload(*args)
        return self.run(*args)

    def query(self, *args: Any) -> Query:
        """What a backend is asked about this call."""
        x = args[0]
        if not self._windowed:
            return Query(self.name, place(x), x.dtype)
        weight, stride = args[self._weight], args[self._stride]
        return Query(self.name, place(x), x.dtype, (weight.shape[2], weight.shape[3]), (stride[0], stride[1]))

    def run(self, *args: Any) -> Any:
        """The op without the dispatcher: the last argument names the backend."""
        return without_autocast(args[0], implementation(self.query(*args), args[-1]), *args[:-1])


def register(schema: str, *, fake: Callable[..., Any], reference: Callable[..., Any]) -> Op:
    """Define one op from its schema: kernel, fake kernel and gradient.

    The last argument of every schema is ``str backend``; ``dispatch`` finds the implementation that
    serves a call. The gradient re-evaluates ``reference``: it needs nothing but the op's
    inputs, so inference-only kernels stay differentiable.
    """

    def run(*args: Any) -> Any:
        return op.run(*args)

    overload = define(
        schema, run=run, fake=lambda *args: fake(*args[:-1]), decomposition=lambda *args: reference(*args[:-1])
    )
    op = Op(schema[: schema.index("(")], [argument.split()[1] for argument in _arguments(schema)], overload)
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
    LIBRARY.impl(name, _with_lists(schema, run), "CompositeExplicitAutograd")
    torch.library.register_fake(overload.name(), _with_lists(schema, fake), lib=LIBRARY)
    internals.decompose_in_export(overload, _with_lists(schema, decomposition))
    return overload


def _arguments(schema: str) -> list[str]:
    """Type and name of each argument."""
    return schema[schema.index("(") + 1 : schema.index(") ->")].split(", ")


def _with_lists(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with [] in place of None, which is how AOTInductor passes an empty list."""
    positions = [i for i, argument in enumerate(_arguments(schema)) if argument.startswith("Tensor[]?")]

    def call(*args: Any) -> Any:
        filled = list(args)
        for i in positions:
            if filled[i] is None:
                filled[i] = []
        return function(*filled)

    return call


def _gradient(reference: Callable[..., Any]) -> tuple[Callable[..., None], Callable[..., Any]]:
    """``setup_context`` and ``backward`` that save an op's inputs and differentiate its reference."""

    def length(argument: Any) -> int | None:
        # Gradients of a tensor list come back as a list; a list of numbers is one argument.
        tensors = isinstance(argument, list) and all(isinstance(item, Tensor) for item in argument)
        return len(argument) if tensors else None

    def nested(leaves: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
        items = iter(leaves)
        return [next(items) if n is None else [next(items) for _ in range(n)] for n in lengths]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.lengths = [length(argument) for argument in inputs[:-1]]
        lists = [[argument] if n is None else argument for argument, n in zip(inputs, ctx.lengths, strict=False)]
        leaves = [*itertools.chain.from_iterable(lists)]
        ctx.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        again = torch.is_grad_enabled()  # somebody will differentiate the gradients
        # Other tensors of the same value either way: an argument may come twice, or be made from another one.
        tensors = iter(t.view_as(t) if again else t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors)
        leaves = [next(tensors) if constant is None else constant[0] for constant in ctx.constants]
        with torch.enable_grad():
            outputs = without_autocast(leaves[0], reference, *nested(leaves, ctx.lengths))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(y, g) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None and y.requires_grad]
        wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        grads = torch.autograd.grad(
            [y for y, _ in pairs], [leaves[i] for i in wanted], [g for _, g in pairs],
            create_graph=again, allow_unused=True,
        )  # fmt: skip
        result: list[Tensor | None] = [None] * len(leaves)
        for i, grad in zip(wanted, grads, strict=True):
            result[i] = grad
        return *nested(result, ctx.lengths), None

    return setup_context, backward
