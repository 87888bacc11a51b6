"""The glue between the ops and the native CPU library, the same for every op."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.backends import Problem
from effnet_kernels.ops.common import to_nhwc
from effnet_kernels.ops.recording import Call, Recording, converted, current

DTYPES = (torch.float32, torch.bfloat16)
_native = torch.ops.effnet_kernels_cpu


def supports(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cpu":
        return False, f"the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return False, "only float32 and bfloat16 have CPU kernels"
    return True, "any shape"


def bind(
    op: str, fake: Callable[..., Any], *, dense: tuple[str, ...] = ("x",), vectors: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """``run`` of one op.

    The native op has the op's own schema without ``backend``, with the outputs in front. Outputs come from the op's
    fake kernel, so the two cannot disagree.

    Args:
        dense: names of the maps that the native op takes in dense [N, H, W, C] only.
        vectors: names of the [N, C] tensors that it takes in contiguous float32 only.
    """
    native = getattr(_native, op).default
    names = [*inspect.signature(fake).parameters]

    def run(*args: Any) -> Any:
        out = fake(*args)
        arguments = dict(zip(names, args, strict=True))
        for name in dense:
            if arguments[name] is not None:
                arguments[name] = converted(arguments[name], to_nhwc)
        for name in vectors:
            if arguments[name] is not None:
                arguments[name] = arguments[name].to(torch.float32).contiguous()
        outs = out if isinstance(out, tuple) else (out,)
        into = current()
        if into is None or not _record(into, op, outs, arguments):
            native(*outs, *arguments.values())
        return out

    return run


# The ops that can be kept, and the inputs beside x with which they cannot, unless they are x.
_KEPT: dict[str, tuple[str, ...]] = {
    "pointwise_conv_bn_act": ("gate", "residual"),
    "depthwise_conv_bn_act": (),
    "squeeze_excite": (),
    "fused_mbconv": (),
    "mbconv": (),
}


def _record(into: Recording, op: str, outs: tuple[Tensor, ...], arguments: dict[str, Any]) -> bool:
    """Note a call, and whether that was to make it."""
    if op not in _KEPT or any(
        arguments[name] is not None and arguments[name] is not arguments["x"] for name in _KEPT[op]
    ):
        into.lose()
        return False
    call = _keep(into, op, outs, arguments)
    if call is None:
        into.raced = True
        into.lose()
        return False
    x = arguments["x"]
    into.follow(into.original(x), x, [call], outs[0])
    return len(outs) == 1 and replay()(call.kept, NO_TABLE, outs[0], x)


def replay() -> Callable[..., bool]:
    """The native op that makes kept calls: program, table, out, x. False where memory is not as the table says."""
    return _native.replay.default


# The table of no sources.
NO_TABLE = torch.empty((0, 3), dtype=torch.int64, device="cpu")


def _keep(into: Recording, op: str, outs: tuple[Tensor, ...], arguments: dict[str, Any]) -> Call | None:
    """The call in a form to be repeated; None where another thread writes its weights all the time."""
    inputs = ("x", *_KEPT[op])
    held = [a for name, a in arguments.items() if name not in inputs]
    flat = itertools.chain.from_iterable(a if isinstance(a, list) else [a] for a in held)
    sources = [into.original(t) for t in flat if isinstance(t, Tensor)]
    keep, pack = (getattr(_native, f"{what}_{op}").default for what in ("keep", "pack"))
    dtype = outs[0].dtype
    for call in into.known:
        alike = (call.op, call.dtype, [*map(id, call.sources)]) == (op, dtype, [*map(id, sources)])
        if alike and (into.constant or _native.unchanged.default(call.table)):
            return call._replace(kept=keep(call.packed, *outs, *arguments.values()))
    for _ in range(3):
        table = _native.digest.default(sources)
        # Converted anew: what came here may be older than the table.
        anew = {name: _anew(into, a) if name not in inputs else a for name, a in arguments.items()}
        packed = pack(*outs, *anew.values())
        if _native.unchanged.default(table):
            return Call(op, dtype, sources, table, packed, keep(packed, *outs, *arguments.values()))
    return None


def _anew(into: Recording, argument: Any) -> Any:
    if isinstance(argument, list):
        return [_anew(into, a) for a in argument]
    return into.original(argument).to(argument.dtype) if isinstance(argument, Tensor) else argument
