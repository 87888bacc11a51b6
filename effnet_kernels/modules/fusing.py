"""Plans: what a block computes, as arguments of the ops, and how it runs on an input.

``fuse`` is the whole forward of a fused block: check that the call may be fused, read the modules into a
plan, run it. It returns None where the stock forward has to run instead.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

import effnet_kernels.functional as F
from effnet_kernels import internals
from effnet_kernels.backends import accelerates
from effnet_kernels.modules import replay
from effnet_kernels.modules.reading import Geometry, Unfusable, check_calls, padding_for
from effnet_kernels.modules.training import Chain, train, wants_gradients

# Instance attribute with the backend that patch() was asked for; absent where that is "auto".
BACKEND_ATTRIBUTE = "_effnet_kernels_backend"


class Plan(Protocol):
    """What every plan can do; ``str()`` describes it in a report."""

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        """The result, or None where no backend does better than the stock forward."""

    def chain(self) -> Chain | None:
        """The plan as a block in training; None where there is no such block."""


class MBConvPlan(NamedTuple):
    """Expand (or not), depthwise, squeeze-and-excitation (or not), project, shortcut (or not)."""

    expand: F.ConvBN | None
    depthwise: F.ConvBN
    geometry: Geometry
    se: F.SqueezeExciteWeights | None
    project: F.ConvBN
    act: str
    project_act: str
    shortcut: bool
    drop_path: nn.Module | None

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        kernel, stride, _ = self.geometry
        dtype = _dtype(x)
        if not accelerates(backend, "mbconv", x.device.type, dtype, kernel, stride):
            return None
        residual = self.shortcut and self.drop_path is None and dtype == x.dtype
        y = F.mbconv(
            x,
            self.expand,
            self.depthwise,
            self.se,
            self.project,
            self.act,
            stride=stride,
            padding=padding_for(self.geometry, x.shape),
            project_act=self.project_act,
            residual=residual,
            backend=backend,
        )
        return _add_shortcut(y, x, self.drop_path) if self.shortcut and not residual else y

    def chain(self) -> Chain:
        expand = [] if self.expand is None else [(self.expand, None, self.act)]
        rest = [(self.depthwise, self.geometry, self.act), (self.project, None, self.project_act)]
        return Chain([*expand, *rest], self.se)

    def __str__(self) -> str:
        name = "depthwise separable" if self.expand is None else "MBConv"
        return _describe(name, self.geometry, self.act, self.se, self.shortcut)


class FusedMBConvPlan(NamedTuple):
    """Dense convolution, squeeze-and-excitation (or not), projection (or not), shortcut (or not)."""

    expand: F.ConvBN
    geometry: Geometry
    se: F.SqueezeExciteWeights | None
    project: F.ConvBN | None
    act: str
    shortcut: bool
    drop_path: nn.Module | None

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        kernel, stride, _ = self.geometry
        dtype = _dtype(x)
        if not accelerates(backend, "fused_mbconv", x.device.type, dtype, kernel, stride):
            return None
        residual = self.shortcut and self.drop_path is None and dtype == x.dtype
        padding = padding_for(self.geometry, x.shape)
        if self.se is None or self.project is None:
            y = F.fused_mbconv(
                x,
                self.expand,
                self.project,
                self.act,
                stride=stride,
                padding=padding,
                residual=residual,
                backend=backend,
            )
        else:
            y = F.fused_mbconv(x, self.expand, None, self.act, stride=stride, padding=padding, backend=backend)
            mean = y.mean((2, 3), dtype=torch.promote_types(y.dtype, torch.float32))
            gate = F.squeeze_excite_gate(mean, self.se, backend=backend)
            y = F.pointwise_conv_bn_act(
                y, *self.project, "identity", gate=gate, residual=x if residual else None, backend=backend
            )
        return _add_shortcut(y, x, self.drop_path) if self.shortcut and not residual else y

    def chain(self) -> Chain:
        project = [] if self.project is None else [(self.project, None, "identity")]
        return Chain([(self.expand, self.geometry, self.act), *project], self.se)

    def __str__(self) -> str:
        name = "convolution" if self.project is None else "Fused-MBConv"
        return _describe(name, self.geometry, self.act, self.se, self.shortcut)


class DepthwisePlan(NamedTuple):
    """Depthwise convolution, BatchNorm, activation, shortcut (or not)."""

    conv: F.ConvBN
    geometry: Geometry
    act: str
    shortcut: bool
    drop_path: nn.Module | None

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        kernel, stride, _ = self.geometry
        if not accelerates(backend, "depthwise_conv_bn_act", x.device.type, _dtype(x), kernel, stride):
            return None
        padding = padding_for(self.geometry, x.shape)
        y, _ = F.depthwise_conv_bn_act(x, *self.conv, self.act, stride=stride, padding=padding, backend=backend)
        return _add_shortcut(y, x, self.drop_path) if self.shortcut else y

    def chain(self) -> Chain:
        return Chain([(self.conv, self.geometry, self.act)])

    def __str__(self) -> str:
        return _describe("depthwise", self.geometry, self.act, None, self.shortcut)


class PointwisePlan(NamedTuple):
    """1x1 convolution, BatchNorm, activation, then global average pool or shortcut (or neither)."""

    conv: F.ConvBN
    act: str
    pool: bool = False
    shortcut: bool = False
    drop_path: nn.Module | None = None

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        dtype = _dtype(x)
        if not accelerates(backend, "pointwise_conv_bn_act", x.device.type, dtype):
            return None
        residual = self.shortcut and self.drop_path is None and dtype == x.dtype
        y = F.pointwise_conv_bn_act(
            x, *self.conv, self.act, residual=x if residual else None, pool=self.pool, backend=backend
        )
        return _add_shortcut(y, x, self.drop_path) if self.shortcut and not residual else y

    def chain(self) -> Chain:
        return Chain([(self.conv, None, self.act)], pool=self.pool)

    def __str__(self) -> str:
        return f"pointwise {self.act}" + " + pool" * self.pool + " + shortcut" * self.shortcut


class SqueezeExcitePlan(NamedTuple):
    """Squeeze-and-excitation on its own."""

    se: F.SqueezeExciteWeights

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        dtype = _dtype(x)
        # Under autocast the stock product keeps the dtype of x where the op would cast it.
        if dtype != x.dtype or not accelerates(backend, "squeeze_excite", x.device.type, dtype):
            return None
        return F.squeeze_excite(x, self.se, backend=backend)

    def chain(self) -> None:
        return None

    def __str__(self) -> str:
        return f"squeeze-and-excitation {self.se.act} {self.se.gate}"


def fuse(
    read: Callable[[nn.Module], Plan], block: nn.Module, x: Tensor, calls: Iterable[nn.Module] | None = None
) -> Tensor | None:
    """Run ``block`` as the plan that ``read`` makes of it, in place of the ``calls`` (all its children if None).

    Returns None where the caller must run the stock modules: they cannot be fused, leaving out their calls
    could be noticed, or no backend does better.
    """
    if not _may_fuse(x):
        return None
    plain = _is_plain(x)
    if plain:
        y = replay.repeat(read, block, x)
        if y is not None:
            return y
    children = tuple(block.__dict__["_modules"].values() if calls is None else calls)
    norms: list[nn.BatchNorm2d] = []
    try:
        check_calls(children, norms)
        plan = read(block)
    except Unfusable:
        return None
    backend = block.__dict__.get(BACKEND_ATTRIBUTE, "auto")
    if norms or block.__dict__["training"]:
        y = _train(plan, x, norms, backend)
        if y is not None or norms:
            return y
    elif plain:
        return replay.run(read, block, children, backend, x, plan)
    return plan.run(x, backend)


def fuse_route(read: Callable[[nn.Module], replay.Route], model: nn.Module, x: Tensor) -> Tensor | None:
    """Run all calls on the route that ``read`` makes of a model as one; None where the caller must make each.

    That is where one of them is not fused or was not kept yet, or where calling the modules in between could be
    noticed.
    """
    if not _may_fuse(x) or not _is_plain(x):
        return None
    y = replay.repeat(read, model, x)
    return replay.join(read, model, x) if y is None else y


def _is_plain(x: Tensor) -> bool:
    """Whether this is inference on a CPU with nobody between us and the kernels."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not internals.dispatch_modes()
        and not torch.is_autocast_enabled("cpu")
    )


def _train(plan: Plan, x: Tensor, norms: list[nn.BatchNorm2d], backend: str) -> Tensor | None:
    """The result in training; None where there is nothing to train, or as ``fuse``."""
    chain = plan.chain()
    if chain is None or not (norms or wants_gradients(chain, x)):
        return None
    dtype = _dtype(x)
    shortcut, drop_path = getattr(plan, "shortcut", False), getattr(plan, "drop_path", None)
    residual = shortcut and drop_path is None and dtype == x.dtype
    y = train(chain, x, dtype, norms, residual, backend)
    return _add_shortcut(y, x, drop_path) if y is not None and shortcut and not residual else y


def _may_fuse(x: Tensor) -> bool:
    """Whether nobody watches, traces or transforms this call in a way that the ops would not take part in."""
    if torch.compiler.is_compiling():
        return isinstance(x, Tensor) and internals.traceable() and not torch.onnx.is_in_onnx_export()
    return type(x) is Tensor and not internals.watched()


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x runs in."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _add_shortcut(y: Tensor, x: Tensor, drop_path: nn.Module | None) -> Tensor:
    return (y if drop_path is None else drop_path(y)) + x


def _describe(name: str, geometry: Geometry, act: str, se: F.SqueezeExciteWeights | None, shortcut: bool) -> str:
    (kh, kw), (sh, _), padding = geometry
    text = f"{name} {kh}x{kw} stride {sh} {act}"
    if padding is None:
        text += " SAME"
    if se is not None:
        text += " + SE"
    return text + " + shortcut" * shortcut
