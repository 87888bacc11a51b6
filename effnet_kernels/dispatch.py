"""Which backends there are, which of them can serve a query, and why the others cannot.

A backend is a row of ``_AVAILABLE`` and one of ``_KERNELS``. "mixed" has a kernel for ``mbconv`` alone; for what that
does not serve, and for other ops, it is the measured order of the GPU's backends.
"""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels import native
from effnet_kernels.internals import constant

ENVIRONMENT_VARIABLE = "EFFNET_KERNELS_BACKEND"


class Query(NamedTuple):
    """What a backend must know to say whether it can serve one call.

    ``device`` is what ``place`` gives; "cuda" is the current GPU.
    """

    op: str
    device: str
    dtype: torch.dtype
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)

    @property
    def device_type(self) -> str:
        """Without the index."""
        return self.device.partition(":")[0]


def place(x: Tensor) -> str:
    """Where x is, for a ``Query``: "cpu", or of several GPUs which, "cuda:1"."""
    return f"cuda:{x.device.index}" if x.is_cuda else x.device.type


# What the kernels use: loop-carried tuples, NaN-propagating minima and maxima, rounded division.
_TRITON_AT_LEAST = (3, 4)


@functools.cache
def _triton_available() -> tuple[bool, str]:
    """Whether Triton is there and has something to run on; imports it only where both may be."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    if not interpreted:
        if not torch.cuda.is_available() or torch.version.cuda is None:
            return False, "no NVIDIA GPU (TRITON_INTERPRET=1, set before Python starts, runs the kernels on the CPU)"
        if all(torch.cuda.get_device_capability(i) < (7, 5) for i in range(torch.cuda.device_count())):
            return False, "no GPU here has compute capability 7.5"
    version = importlib.import_module("triton").__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _TRITON_AT_LEAST:
        return False, f"Triton {version} is older than {'.'.join(map(str, _TRITON_AT_LEAST))}"
    return True, f"Triton {version}" + ", interpreted on the CPU" * interpreted


def _mixed_available() -> tuple[bool, str]:
    """Triton and CUDA C++ side by side."""
    for available in (native.cuda_available, _triton_available):
        served, reason = available()
        if not served:
            return False, reason
    return True, "each op, and each part of a block, on the faster one of triton and cuda"


_AVAILABLE: dict[str, Callable[[], tuple[bool, str]]] = {
    "cpu": native.cpu_available,
    "mixed": _mixed_available,
    "triton": _triton_available,
    "cuda": native.cuda_available,
    "reference": lambda: (True, "plain PyTorch"),
}

# In effnet_kernels/ops/: ``supports(query) -> (bool, reason)`` of each backend, and its kernel of an op, which takes
# the op's arguments. The modules are imported when they are needed: Triton is not there on every machine.
_KERNELS: dict[str, tuple[str, str]] = {
    "cpu": ("native_cpu.supports", "{op}.cpu"),
    "mixed": ("mbconv_mixed.supports", "{op}_mixed.run"),
    "triton": ("triton_common.supports", "{op}_triton.run"),
    "cuda": ("native_cuda.supports", "{op}.cuda"),
    "reference": ("common.supports", "{op}.reference"),
}

# Fastest first. The reference is last everywhere: it defines the numbers, not the speed.
_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("mixed", "triton", "cuda", "reference"),
}
_DEFAULT_ORDER = ("reference",)
# On a GPU the order is one for each op: `python -m benchmarks.dispatch` writes it from what was measured, and where.
_DISPATCH = json.loads(Path(__file__).with_name("dispatch.json").read_text())
_ORDER_OF_OP: dict[tuple[str, str], tuple[str, ...]] = {
    ("cuda", op): (*order, "reference") for op, order in _DISPATCH["order"].items()
}
# In training CUDA C++ has the depthwise convolutions alone, between eager passes: on request only.
_ORDER_OF_OP["cuda", "conv_block_train"] = ("triton", "reference")


def order_measured() -> str | None:
    """Where the order of the GPU backends was measured; None: it is an expectation."""
    return _DISPATCH["measured"]


_requested: contextvars.ContextVar[str] = contextvars.ContextVar("effnet_kernels_backend", default="auto")
_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar("effnet_kernels_assumed", default=None)


def backends() -> Mapping[str, tuple[bool, str]]:
    """Every backend by name, as ``(available, reason)``; the reason explains both answers."""
    return MappingProxyType({name: available() for name, available in _AVAILABLE.items()})


def check_backend(name: str) -> str:
    """Return ``name``; raise ValueError if there is no such backend, RuntimeError if it cannot run here."""
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {type(name).__name__}")
    if name == "auto":
        return name
    if name not in _AVAILABLE:
        raise ValueError(f"backend must be one of {('auto', *_AVAILABLE)}, got {name!r}")
    available, reason = _AVAILABLE[name]()
    if not available:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    return name


def automatic(device: str, op: str | None = None) -> tuple[str, ...]:
    """The backends that "auto" tries for tensors on this kind of device, in order; for most ops, or for this one."""
    order = _ORDER.get(device, _DEFAULT_ORDER)
    return order if op is None else _ORDER_OF_OP.get((device, op), order)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of every op called inside the ``with`` block, in this thread or task.

    It rules wherever no backend was named closer to the call (``patch(model, backend=...)`` or an
    op's ``backend=`` argument). Outside, the environment variable ``EFFNET_KERNELS_BACKEND`` rules.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend exists but cannot run here; the message says why.
    """
    token = _requested.set(check_backend(name))
    try:
        yield
    finally:
        _requested.reset(token)


@contextlib.contextmanager
def assume(name: str) -> Iterator[None]:
    """As ``use_backend``, whether the backend can run here or not; tensors may be on the meta device."""
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)


def requested(backend: str = "auto") -> str:
    """The backend asked for: by argument, else by ``use_backend``, else by the environment."""
    if backend == "auto":
        backend = _requested.get()
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    return backend


def implementation(query: Query, backend: str = "auto") -> Any:
    """The kernel that computes ``query`` on the backend asked for (see ``requested``).

    Raises:
        ValueError, RuntimeError: the backend was asked for by name and is unknown, unavailable, or
            does not support this query; the message carries its reason.
    """
    assumed = _assumed.get()
    if assumed is not None:
        return kernel_of(query.op, assumed)
    return _resolve(_placed(query), requested(backend))[1]


@constant
def accelerates(backend: str, *query: Any) -> bool:
    """Whether a fused call is worth making: a backend was named, or ``auto`` finds a real kernel.

    ``query``: the fields of a ``Query``, for torch.compile one by one.
    """
    if _assumed.get() is not None:
        return True
    wanted = _placed(Query(*query))
    asked = "auto" if wanted.device == "meta" else requested(backend)  # without data there is nothing to compute
    return asked != "auto" or _resolve(wanted, asked)[0] != "reference"


@constant
def serves(backend: str, *query: Any) -> bool:
    """Whether a fused call is worth making and possible; a backend named without a kernel for it is no error."""
    try:
        return accelerates(backend, *query) and bool(implementation(Query(*query), backend))
    except RuntimeError:
        return False


def _placed(query: Query) -> Query:
    """The query with the index of the current GPU where it names none."""
    if query.device != "cuda" or not torch.cuda.is_available():
        return query
    return query._replace(device=f"cuda:{torch.cuda.current_device()}")


def kernel_of(op: str, backend: str) -> Any:
    """The kernel of an op on a backend, whether that can run here or not."""
    return _found(_KERNELS[backend][1].format(op=op))


def _found(path: str) -> Any:
    module, _, name = path.partition(".")
    return getattr(importlib.import_module(f"effnet_kernels.ops.{module}"), name)


@functools.lru_cache(maxsize=4096)
def _resolve(query: Query, asked: str) -> tuple[str, Callable[..., Any]]:
    candidates = automatic(query.device_type, query.op) if asked == "auto" else (check_backend(asked),)
    if asked == "mixed":
        candidates = automatic("cuda", query.op)[:-1]  # without the reference
    for name in candidates:
        served, reason = _AVAILABLE[name]()
        if served:
            try:
                kernel, (served, reason) = kernel_of(query.op, name), _found(_KERNELS[name][0])(query)
            except ModuleNotFoundError as error:
                served, reason = False, f"no kernel for it ({error})"
        if served:
            return name, kernel
    raise RuntimeError(f"backend {asked!r} cannot serve {query.op} on {query.device} in {query.dtype}: {reason}")
