"""The glue between the ops and the native CPU library, the same for every op."""

import inspect
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_kernels import native
from effnet_kernels.dispatch import Query
from effnet_kernels.ops.common import to_nhwc
from effnet_kernels.ops.recording import Call, Recording, converted, current

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_native = torch.ops.effnet_kernels_cpu


def supports(query: Query) -> tuple[bool, str]:
    if query.device != "cpu":
        return False, f"the tensors are on {query.device}"
    if query.dtype not in DTYPES:
        return False, "only float32, float16 and bfloat16 have CPU kernels"
    if query.op == "conv_block_train" and query.dtype == torch.float16:
        return False, "only float32 and bfloat16 train on the CPU: small gradients are zero in float16"
    return True, "any shape"


def bind(
    op: str,
    fake: Callable[..., Any],
    *,
    dense: tuple[str, ...] = ("x",),
    vectors: tuple[str, ...] = (),
    strided_unless: str | None = None,
) -> Callable[..., Any]:
    """The op on this backend.

    The native op has the op's own schema without ``backend``, with the outputs in front. Outputs come from the op's
    fake kernel, so the two cannot disagree. It is looked up when it is called: the library may not be there.

    Args:
        dense: names of the maps that the native op takes in dense [N, H, W, C] only.
        vectors: names of the [N, C] tensors that it takes in contiguous float32 only.
        strided_unless: name of an argument without which it takes x in any strides.
    """
    names = [*inspect.signature(fake).parameters]

    def run(*args: Any) -> Any:
        out = fake(*args)
        arguments = dict(zip(names, args, strict=True))
        as_it_is = strided_unless is not None and not arguments[strided_unless]
        for name in dense:
            if arguments[name] is not None and not (as_it_is and name == "x"):
                arguments[name] = converted(arguments[name], to_nhwc)
        for name in vectors:
            if arguments[name] is not None:
                arguments[name] = arguments[name].to(torch.float32).contiguous()
        outs = out if isinstance(out, tuple) else (out,)
        into = current()
        if into is None or not _record(into, op, outs, arguments):
            getattr(_native, op).default(*outs, *arguments.values())
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
    if op not in _KEPT:
        into.lose()
        return False
    x, others = arguments["x"], [arguments[name] for name in _KEPT[op] if arguments[name] is not None]
    call = None if any(other is not x for other in others) else _keep(into, op, outs, arguments)
    if call is None:
        into.lose()
        return False
    into.follow(into.original(x), x, [call], outs[0])
    return len(outs) == 1 and replay()(call.kept, NO_TABLE, outs[0], x)


def replay() -> Callable[..., bool]:
    """The native op that makes kept calls: program, table, out, x. False where memory is not as the table says."""
    return _native.replay.default


# The table of no sources.
NO_TABLE = torch.empty((0, 3), dtype=torch.int64, device="cpu")


def _keep(into: Recording, op: str, outs: tuple[Tensor, ...], arguments: dict[str, Any]) -> Call | None:
    """The call in a form to be repeated; None where tensors are not what lies in their memory.

    Another thread may be writing the weights. They are packed when they have come to rest; if they never do, it is the
    call that was known before that is made, of the weights before the write, and looked at again the next time.
    """
    constants = {name: a for name, a in arguments.items() if name not in ("x", *_KEPT[op])}
    sources: list[Tensor] = []
    _map([*constants.values()], lambda t: sources.append(into.original(t)))
    keep, pack = (getattr(_native, f"{what}_{op}").default for what in ("keep", "pack"))
    if any(t.is_neg() or t.is_conj() for t in sources):
        return None
    # What constants depend on beside the sources: epsilons, and the stride, which decides about Winograd's algorithm.
    epsilons = (a for a in constants.values() if isinstance(a, float))
    settings = (op, outs[0].dtype, native.instruction_set(), *epsilons, *constants.get("stride", ()))
    alike = settings, [*map(id, sources)]
    known = [call for call in into.known if (call.settings, [*map(id, call.sources)]) == alike]
    for call in known:
        if into.constant or (places(call.sources) == places(call.memory) and _native.unchanged.default(call.table)):
            return call._replace(kept=keep(call.packed, *outs, *arguments.values()))
    for _ in range(_LOOKS):
        memory = [t.data for t in sources]  # of this moment: a source may be given other memory
        table = _native.digest.default(memory)
        of = dict(zip(map(id, sources), memory, strict=True))
        # Converted again: what came here may be older than the table.
        anew = {
            name: _map(a, lambda t, of=of: of[id(into.original(t))].to(t.dtype))  # type: ignore[misc]
            for name, a in constants.items()
        }
        packed = pack(*outs, *(arguments | anew).values())
        if known and threading.active_count() > 1:
            time.sleep(_REST)
        if _native.unchanged.default(table):
            break
    else:
        if known:
            return known[-1]._replace(kept=keep(known[-1].packed, *outs, *arguments.values()))
    return Call(settings, sources, memory, table, packed, keep(packed, *outs, *arguments.values()))


def _map(argument: Any, convert: Callable[[Tensor], Any]) -> Any:
    """An argument with all tensors in it converted."""
    if isinstance(argument, list):
        return [_map(a, convert) for a in argument]
    return convert(argument) if isinstance(argument, Tensor) else argument


def places(tensors: list[Tensor]) -> list[Any]:
    """Where tensors lie in memory, and how."""
    return [*map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors), *map(Tensor.numel, tensors)]


# How often to look whether weights have come to rest that another thread may be writing, and how far apart, in seconds.
_LOOKS, _REST = 5, 1e-3
