"""Every name of torch that the package uses and torch does not document: what each is for, and what is done without it.

Before a fused call may stand for the calls of stock modules it must be known who watches them and what has changed
since; torch has no public question for that. The names are looked up once, when this module is imported. Where a torch
lacks one, the answer is the careful one, results stay those of stock, and ``missing`` says what it costs. What there is
of this kind for Triton stands in ``ops/triton_common.py`` and ``precompile.py``.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.jit import is_tracing
from torch.utils.hooks import RemovableHandle

Function = TypeVar("Function", bound=Callable[..., Any])

# Names that this torch lacks, and what is done without each.
missing: dict[str, str] = {}
_STOCK = "blocks run their stock forward"


def _find(name: str, without: str, otherwise: Any = None) -> Any:
    """``torch.<name>``; where that is not there, ``otherwise``."""
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        missing[f"torch.{name}"] = without
        return otherwise


# Hooks on all modules would not see the modules that a fused call leaves out.
_any_global_hook = _find("nn.modules.module._has_any_global_hook", _STOCK)
# vmap, grad and the other transforms of torch.func: the ops have no rules for them.
_transform = _find("_C._functorch.peek_interpreter_stack", _STOCK, lambda: True)
# Forward-mode differentiation: neither have they for that. A number that changes, read where it is.
_find("autograd.forward_ad._current_level", _STOCK)
# What a module is made of, in its dictionary: nn.Module's own __getattr__ takes several times as long (``reading``).
MODULE_ENTRIES = (
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip
missing.update({f"torch.nn.Module.{name}": _STOCK for name in MODULE_ENTRIES if name not in nn.Module().__dict__})

# Why no block can be fused with this torch; None where it can.
refusal = f"this torch has no {', '.join(missing)}" if missing else None

# Batches in disguise, of vmap and of ``autograd.grad(is_grads_batched=True)``: the kernels have no rules for these.
_batches = [
    _find(f"_C._functorch.{name}", "batches of gradients of a fused block are torch's own error", lambda t: False)
    for name in ("is_batchedtensor", "is_legacy_batchedtensor")
]
# What a call of a module goes through on its way to forward, and a convolution and a BatchNorm behind it. Where they
# have other names, it goes unnoticed if somebody replaces them.
CALL, CONV_FORWARD, CHECK_INPUT = "_call_impl", "_conv_forward", "_check_input_dim"
# What moves or converts a module's tensors, and what loads them: what was kept of those before is let go there.
# Where they have other names, it is let go at the next forward.
APPLY, LOAD = "_apply", "_load_from_state_dict"
# Where ``module.compile()`` leaves what is called then. Where it has another name, it is left out with the module.
COMPILED = "_compiled_call_impl"
# Attribute that FSDP puts on every module whose weights it gathers, and the module of its way to replicate, which puts
# none; and of another one. Where they have other names, wrapped blocks run their stock forward.
GATHERED = "_is_fsdp_managed_module"
REPLICATE, REPLICATE_BY_DDP = (f"torch.distributed._composable.replicate{how}" for how in ("_with_fsdp", ""))
# Dispatch modes see every op: they are active where this is not 0.
dispatch_modes: Callable[[], int] = _find(
    "_C._len_torch_dispatch_stack",
    "ops go through torch's dispatcher, and no forward is repeated as a program",
    lambda: 1,
)
_counter = itertools.count()  # what cannot be counted counts as changed


def _hooks_registered() -> int:
    return RemovableHandle.next_id


# How many hooks were ever registered, on whatever module.
hooks_registered: Callable[[], int] = _hooks_registered
if _find("utils.hooks.RemovableHandle.next_id", "programs look for hooks at each call") is None:
    hooks_registered = _counter.__next__


def watched() -> bool:
    """Whether hooks on all modules, a trace or a transform have to see the modules of this call."""
    return (
        refusal is not None
        or is_tracing()
        or _any_global_hook()
        or _transform() is not None
        or forward_ad._current_level >= 0
    )


def batched(t: Tensor) -> bool:
    """Whether a tensor is a batch of them."""
    return any(is_batch(t) for is_batch in _batches)


def dispatched() -> bool:
    """Whether a mode or a transform has to see the ops of this call."""
    return bool(dispatch_modes()) or _transform() is not None


# Leaves dispatch modes aside: whoever traces a model that asks a library something would note the question.
without_modes: Callable[[], AbstractContextManager[Any]] = _find(
    "utils._python_dispatch._disable_current_modes", "exported programs may ask the library for its instruction set",
    contextlib.nullcontext,
)  # fmt: skip
_implicit = _find("_C.DispatchKey.CompositeImplicitAutograd", "exported programs keep our ops when they are decomposed")
_autograd = _find("_C.DispatchKey.AutogradCPU", "exported programs keep our ops when they are decomposed")


def decompose_in_export(op: Any, decomposition: Callable[..., Any]) -> None:
    """Enter ``decomposition`` where the tables of torch.export, and of converters built on them, look for it.

    Compilers look there too, but have to keep the op. Export alone has Python kernels for autograd beside the
    entry, and only while it decomposes a program by a table that has this op.
    """
    if _implicit is None or _autograd is None or not hasattr(op, "py_impl"):
        return

    def entry(*args: Any) -> Any:
        kernels = op.py_kernels
        if kernels.get(_implicit) is entry and _autograd in kernels:
            return decomposition(*args)
        # Inductor starts from export's table, and then refuses ops in it that were kept.
        inductor = sys.modules.get("torch._inductor.decomposition")
        if inductor is not None:
            for table in (inductor.decompositions, inductor.select_decomp_table()):
                table.pop(op, None)
        return NotImplemented

    op.py_impl(_implicit)(entry)


def for_every_size(condition: bool) -> bool:
    """Whether a condition holds whatever the sizes are that are symbols in it.

    A plain ``if`` would be a guard on them, which export cannot always prove.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def constant(function: Function) -> Function:
    """Let torch.compile call the function as it traces, and take the result for a constant.

    This is torch.compiler.assume_constant_result without importing the compiler, and Triton with it. Arguments must be
    plain values: torch 2.14 hands over named tuples with nothing in them.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def traceable() -> bool:
    """Whether blocks may be fused under torch.compile: not where it traces what is marked ``constant``."""
    return refusal is None and not torch.compiler.is_dynamo_compiling()
