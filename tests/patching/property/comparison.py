"""Three models go the same way; after every call all that can be seen from outside is compared."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

import effnet_kernels as ek
from tests.criterion import GRADIENTS, measuring, rms, stock_error
from tests.models import BACKENDS
from tests.patching.property.changes import ACTIONS, On, _log, another_child
from tests.patching.property.models import three

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class Call(NamedTuple):
    """One way to call a model, ``times`` times."""

    training: bool | None = None  # None: as it is
    mode: str = "no_grad"
    autocast: bool = False
    layout: str = "contiguous"
    size: tuple[int, int, int] = (2, 37, 37)  # N, H, W
    door: str = "forward"
    backend: str = "auto"
    input_grad: bool = False
    times: int = 1


class Do(NamedTuple):
    """Something done to a model: to the ``where``-th module that it can be done to, or the one of this name, in the
    ``how``-th way.
    """

    what: str
    where: int | str = 0
    how: int = 0


class Case(NamedTuple):
    name: str = "blocks"
    dtype: str = "float32"
    steps: Sequence[Call | Do] = (Call(),)


class Noting(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _under(context: Any, model: nn.Module, x: Tensor) -> Any:
    with context:
        return model(x)


DOORS: dict[str, Callable[[Any, Tensor], Any]] = {
    "forward": lambda m, x: m(x),
    "features": lambda m, x: m.forward_head(m.forward_features(x)),
    "intermediates": lambda m, x: m.forward_intermediates(x),
    "functional": lambda m, x: functional_call(m, {n: 1.25 * p for n, p in m.named_parameters()}, x),
    "checkpoint": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "function mode": lambda m, x: _under(Noting(), m, x),
    "default dtype": lambda m, x: _under(_double(), m, x),
    "saved on the cpu": lambda m, x: _under(torch.autograd.graph.save_on_cpu(), m, x),
    "anomalies": lambda m, x: _under(torch.autograd.set_detect_anomaly(True), m, x),
    "vmap": lambda m, x: torch.vmap(m, randomness="different")(x[None]),
}


class Outcome(NamedTuple):
    error: tuple[type, str] | None
    results: list[Tensor]
    gradients: list[Tensor | None]  # of x and of all parameters
    buffers: list[Tensor]
    kinds: Any  # what is compared for equality
    log: list[Any]


def layout(x: Tensor, how: str) -> Tensor:
    """The same or other values in the memory that is asked for."""
    match how:
        case "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        case "expanded":
            return x[:1].expand_as(x)
        case "sliced":
            wide = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 3), torch.nan, dtype=x.dtype)
            wide[:, :-1, 1:-1, 2:-1] = x
            return wide[:, :-1, 1:-1, 2:-1]
        case "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        case "negative":
            return torch._neg_view(x)
        case "of inference mode":
            with torch.inference_mode():
                return x.clone()
        case "of inference mode, channels_last":
            with torch.inference_mode():
                return x.clone(memory_format=torch.channels_last)
        case "nested":
            return torch.nested.nested_tensor([*x])
        case "unbatched":
            return x.mean(0)
        case "parameter":
            return nn.Parameter(x)
    return x


def input_for(call: Call, dtype: torch.dtype, role: str, i: int) -> Tensor:
    n, h, w = call.size
    x = torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(i)).to(dtype)
    x = layout(x, call.layout)
    if role == "exact":
        x = x.detach().double().requires_grad_(x.requires_grad)
    if call.layout in ("nested", "of inference mode", "of inference mode, channels_last"):
        return x  # these want no gradients
    return x.requires_grad_() if call.input_grad else x


def outcome(model: nn.Module, call: Call, x: Tensor, role: str) -> Outcome:
    model.zero_grad()
    torch.manual_seed(11)
    _log.clear()
    results, error = [], None
    autocast = call.autocast and role != "exact"
    parameters = [*model.parameters()]
    measured = (
        role == "stock"
        and (x.dtype == torch.float32 if autocast else x.dtype in (torch.bfloat16, torch.float16))
        and (autocast or {p.dtype for p in parameters} == {x.dtype})
        and not any(t.is_inference() for t in (x, *parameters))  # torch's words about these are of its own conv2d
        and call.door != "vmap"  # as are its rules for autocast
    )
    try:
        with contextlib.ExitStack() as around:
            if measured:
                around.enter_context(measuring())
            if role == "patched":
                around.enter_context(ek.use_backend(call.backend))
            with contextlib.ExitStack() as stack:
                stack.enter_context(MODES[call.mode]())
                if autocast:
                    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                results, spec = tree_flatten(DOORS[call.door](model, x))
            wanted = [t for t in results if t.requires_grad]
            if wanted:
                weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(t.dim())) for t in wanted]
                torch.autograd.backward(wanted, [w.to(t) for w, t in zip(weights, wanted, strict=True)])
    except Exception as e:  # whatever stock raises
        error = (type(e), re.sub("0x[0-9a-f]+|ours|tests.*", "", str(e)))
        return Outcome(error, [], [], [], None, [*_log])
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    of = [*results, *gradients, *model.buffers()]
    kinds = [
        (t is None) or (t.shape, t.dtype, t.device, t.requires_grad, t.grad_fn is None, t.is_inference(), type(t))
        for t in of
    ]
    results = [t.detach().clone() for t in results]
    return Outcome(None, results, gradients, [x.detach(), *model.buffers()], (spec, kinds), [*_log])


def local(t: Tensor) -> Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


def values(model: nn.Module) -> list[Tensor]:
    return [local(t.detach()) for t in (*model.parameters(), *model.buffers())]


@torch.no_grad()
def follow(model: nn.Module, values_of: list[Tensor]) -> None:
    """Give the model these values where it has others."""
    for t, value in zip(values(model), values_of, strict=True):
        if not torch.equal(t, value.to(t.dtype)):
            t.copy_(value)


def _jittered(t: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    return t.double() * (1 + eps * torch.randn(t.shape, generator=generator, dtype=torch.float64))


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    found = [local(t).detach().double().flatten() for t in tensors if t is not None]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


class World:
    """The three models, and what has to be undone in the end."""

    def __init__(self, case: Case, stack: contextlib.ExitStack) -> None:
        self.case, self.stack = case, stack
        self.dtype = DTYPES[case.dtype]
        self.models = three(case.name)
        for role in ("stock", "patched"):
            self.models[role].to(self.dtype)
        self.checkpointed, self.backend = False, "auto"

    def do(self, do: Do) -> bool:
        """Whether the case goes on."""
        kinds, function = ACTIONS[do.what]
        path = ""
        if kinds:
            known = {name for name, _ in self.models["patched"].named_modules()}
            paths = [n for n, m in self.models["stock"].named_modules() if isinstance(m, kinds) and n in known]
            if function in (another_child,):
                paths = [p for p in paths if p]
            if not paths:
                return True
            path = paths[do.where % len(paths)] if isinstance(do.where, int) else do.where
            assert path in paths, do
        errors = {}
        for role, model in self.models.items():
            try:
                made = function(On(model, path, do.how, role, self.dtype, self.stack))
                self.models[role] = model if made is None else made
            except Exception as e:
                errors[role] = (type(e), re.sub("0x[0-9a-f]+", "", str(e)))
        assert errors.get("patched") == errors.get("stock"), do
        if do.what == "backend of the model":
            self.backend = BACKENDS[do.how % len(BACKENDS)]
        self.checkpointed |= do.what == "checkpointing"
        return not errors

    def call(self, call: Call) -> bool:
        return all(self._once(call, i) for i in range(call.times))

    def _once(self, call: Call, i: int) -> bool:
        models = self.models
        if call.training is not None:
            for model in models.values():
                model.train(call.training)
        follow(models["patched"], values(models["stock"]))
        before = values(models["stock"])
        before = [t.clone() for t in before]
        follow(models["exact"], before)
        found = {}
        for role in ("stock", "patched", "exact"):
            x = input_for(call, self.dtype, role, i)
            found[role] = outcome(models[role], call, x, role)
        stock, patched, exact = found.values()
        if patched.error != stock.error and "cpu" in (call.backend, self.backend):
            # A backend that was named and cannot serve says so.
            assert "backend 'cpu' cannot serve" in str(patched.error)
            return False
        assert patched.error == stock.error
        assert patched.log == stock.log
        if stock.error is not None:
            return False
        assert patched.kinds == stock.kinds
        if exact.error is not None:
            return False
        names = ["results", "gradients", "buffers"]
        if self.checkpointed:  # docs/training.md: stock's running statistics may move twice
            names.remove("buffers")
        eps = torch.finfo(torch.bfloat16 if call.autocast else self.dtype).eps
        # Of convolutions in 16 bits to maps of one column, torch's own may give anything (docs/numerics.md).
        narrow = eps > torch.finfo(torch.float32).eps and min(call.size[1:]) < 4
        sensitive = None
        for name in names:
            s, p, e = (flat(getattr(o, name)) for o in (stock, patched, exact))
            if not e.numel():
                continue
            if narrow:
                continue
            assert p.isfinite().equal(s.isfinite()) or not e.isfinite().all(), name
            if not (e.isfinite().all() and s.isfinite().all() and p.isfinite().all()):
                continue
            allowed, error = 2 * rms(stock_error(s, e)) + GRADIENTS * eps * rms(e), rms(p - e)
            if error > allowed:
                if sensitive is None:
                    generator = torch.Generator().manual_seed(3)
                    noisy = [t if t.dtype == torch.long else _jittered(t, eps, generator) for t in before]
                    follow(models["exact"], noisy)
                    x = input_for(call, self.dtype, "exact", i)
                    x = _jittered(x.detach(), eps, generator).requires_grad_(x.requires_grad)
                    sensitive = outcome(models["exact"], call, x, "exact")
                allowed += 2 * rms(flat(getattr(sensitive, name)) - e)
            if allowed > rms(e) / 4:  # one rounding of input and weights makes this much of a difference: it is noise
                continue
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, size {rms(e):.3g}"
        return True


def check(case: Case) -> None:
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = World(case, stack)
        for step in case.steps:
            if not (world.call(step) if isinstance(step, Call) else world.do(step)):
                break
