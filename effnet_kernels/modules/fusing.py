"""Plans: what a block computes, as arguments of the ops, and how it runs on an input.

``fuse`` is the whole forward of a fused block: check that the call may be fused, read the modules into a
plan, run it. It returns None where the stock forward has to run instead.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

import effnet_kernels.functional as F
from effnet_kernels.dispatch import accelerates, place, serves
from effnet_kernels.modules import program, reading
from effnet_kernels.modules.guards import as_written, check_calls, check_class, is_plain, may_fuse
from effnet_kernels.modules.program import BACKEND_ATTRIBUTE
from effnet_kernels.modules.reading import Geometry, Unfusable, padding_for
from effnet_kernels.ops.common import autocast_dtype
from effnet_kernels.training import ConvBNAct, conv_block, update_running_statistics


class Plan(Protocol):
    """What every plan can do; ``str()`` describes it in a report."""

    @property
    def norms(self) -> Sequence[nn.BatchNorm2d]:
        """The BatchNorms, in the order in which x meets them."""

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        """The result; None where the stock forward has to run."""

    def layers(self, size: Sequence[int]) -> list[ConvBNAct]:
        """The plan as the layers of ``training.conv_block`` for x of this size, one per norm; [] if it has none."""


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
    norms: Sequence[nn.BatchNorm2d]

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        residual = self.shortcut and self.drop_path is None and _dtype(x) == x.dtype
        y = F.mbconv(
            x,
            self.expand,
            self.depthwise,
            self.se,
            self.project,
            self.act,
            stride=self.geometry[1],
            padding=padding_for(self.geometry, x.shape),
            project_act=self.project_act,
            residual=residual,
            backend=backend,
        )
        return _add_shortcut(y, x, self.drop_path) if self.shortcut and not residual else y

    def layers(self, size: Sequence[int]) -> list[ConvBNAct]:
        expand = [] if self.expand is None else [ConvBNAct(*self.expand, self.act)]
        depthwise = ConvBNAct(*self.depthwise, self.act, self.geometry[1], padding_for(self.geometry, size))
        return [*expand, depthwise, ConvBNAct(*self.project, self.project_act)]

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
    norms: Sequence[nn.BatchNorm2d]

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        residual = self.shortcut and self.drop_path is None and _dtype(x) == x.dtype
        stride, padding = self.geometry[1], padding_for(self.geometry, x.shape)
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

    def layers(self, size: Sequence[int]) -> list[ConvBNAct]:
        expand = ConvBNAct(*self.expand, self.act, self.geometry[1], padding_for(self.geometry, size))
        return [expand] if self.project is None else [expand, ConvBNAct(*self.project, "identity")]

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
    norms: Sequence[nn.BatchNorm2d]

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        stride, padding = self.geometry[1], padding_for(self.geometry, x.shape)
        y, _ = F.depthwise_conv_bn_act(x, *self.conv, self.act, stride=stride, padding=padding, backend=backend)
        return _add_shortcut(y, x, self.drop_path) if self.shortcut else y

    def layers(self, size: Sequence[int]) -> list[ConvBNAct]:
        return [ConvBNAct(*self.conv, self.act, self.geometry[1], padding_for(self.geometry, size))]

    def __str__(self) -> str:
        return _describe("depthwise", self.geometry, self.act, None, self.shortcut)


class PointwisePlan(NamedTuple):
    """1x1 convolution, BatchNorm, activation, then global average pool or shortcut (or neither)."""

    conv: F.ConvBN
    act: str
    shortcut: bool
    drop_path: nn.Module | None
    norms: Sequence[nn.BatchNorm2d]
    pool: bool = False

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        residual = self.shortcut and self.drop_path is None and _dtype(x) == x.dtype
        y = F.pointwise_conv_bn_act(
            x, *self.conv, self.act, residual=x if residual else None, pool=self.pool, backend=backend
        )
        return _add_shortcut(y, x, self.drop_path) if self.shortcut and not residual else y

    def layers(self, size: Sequence[int]) -> list[ConvBNAct]:
        return [ConvBNAct(*self.conv, self.act)]

    def __str__(self) -> str:
        return f"pointwise {self.act}" + " + pool" * self.pool + " + shortcut" * self.shortcut


class SqueezeExcitePlan(NamedTuple):
    """Squeeze-and-excitation on its own."""

    se: F.SqueezeExciteWeights
    norms: Sequence[nn.BatchNorm2d] = ()

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        if _dtype(x) != x.dtype:  # under autocast the stock product keeps the dtype of x where the op would cast it
            return None
        return F.squeeze_excite(x, self.se, backend=backend)

    def layers(self, size: Sequence[int]) -> list[ConvBNAct]:
        return []

    def __str__(self) -> str:
        return f"squeeze-and-excitation {self.se.act} {self.se.gate}"


def plan_of_conv(
    conv: nn.Module, bn: F.BatchNorm, act: str, shortcut: bool, drop_path: nn.Module | None, norm: nn.BatchNorm2d
) -> Plan:
    """The plan of one convolution with BatchNorm and activation: pointwise, depthwise or dense."""
    rest = act, shortcut, drop_path, [norm]
    if reading.is_pointwise(conv):
        return PointwisePlan(F.ConvBN(reading.pointwise(conv), bn), *rest)
    depthwise = reading.is_depthwise(conv)
    weight, geometry = reading.spatial(conv, depthwise=depthwise)
    if depthwise:
        return DepthwisePlan(F.ConvBN(weight, bn), geometry, *rest)
    return FusedMBConvPlan(F.ConvBN(weight, bn), geometry, None, None, *rest)


# The op that decides whether a backend does better than the stock forward.
_OPS: dict[type, str] = {
    MBConvPlan: "mbconv",
    FusedMBConvPlan: "fused_mbconv",
    DepthwisePlan: "depthwise_conv_bn_act",
    PointwisePlan: "pointwise_conv_bn_act",
    SqueezeExcitePlan: "squeeze_excite",
}


class Part(NamedTuple):
    """What one plan covers: the whole module, or those modules in it, by name, whose calls it replaces."""

    read: Callable[[nn.Module], Plan]
    calls: Callable[[nn.Module], dict[str, nn.Module]] | None = None

    def replaced(self, module: nn.Module) -> dict[str, nn.Module]:
        """The modules by name whose calls the plan replaces."""
        return module.__dict__["_modules"] if self.calls is None else self.calls(module)


def fuse(part: Part, block: nn.Module, x: Tensor) -> Tensor | None:
    """Run a part of ``block``, or all of it, as the plan that there is for it.

    Returns None where the caller must run the stock modules: they cannot be fused, leaving out their calls
    could be noticed, no backend does better, or x is nothing that they take: then they say so.
    """
    if not may_fuse(x):
        return None
    kept = is_plain(x) and program.may_keep(x)
    if kept:
        y = program.repeat(part, block, x)
        if y is not None:
            return y
    try:
        plan = plan_of(part, block)
    except Unfusable:
        return None
    backend = block.__dict__.get(BACKEND_ATTRIBUTE, "auto")
    try:
        if any(norm.training for norm in plan.norms) or _wants_gradients(plan, x):
            if not torch.compiler.is_compiling():
                program.thaw(block)
            return _train(plan, x, backend)
        if not _is_worth_it(plan, x, backend):
            return None
        if kept:
            replaced = part.replaced(block).values()
            return program.record(part, block, replaced, x, lambda x: plan.run(x, backend))
        return plan.run(x, backend)
    except F.InputError:
        return None


def plan_of(part: Part, block: nn.Module) -> Plan:
    """The plan of a part; raises Unfusable where running it in place of the calls could be noticed."""
    try:
        if part.calls is None:
            check_class(type(block))
        check_calls(part.replaced(block).values())
        return part.read(block)
    except KeyError as missing:
        raise Unfusable(f"there is no {missing.args[0]}") from None


def fuse_all(
    passed: Callable[[nn.Module], Iterable[nn.Module | None]],
    model: nn.Module,
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
) -> Tensor:
    """``forward(x)``, as one program where all of it comes down to one.

    Args:
        passed: the modules of the model that forward calls, or what is fused in it replaces.
    """
    if not may_fuse(x) or not is_plain(x) or not as_written(type(model)):
        return forward(x)
    y = program.repeat(passed, model, x)
    return program.record_all(passed, model, passed(model), x, forward) if y is None else y


def _is_worth_it(plan: Plan, x: Tensor, backend: str) -> bool:
    """Whether a backend was named, or one does better than the stock forward."""
    kernel, stride, _ = getattr(plan, "geometry", ((1, 1), (1, 1), None))
    return accelerates(backend, _OPS[type(plan)], place(x), _dtype(x), kernel, stride)


def _wants_gradients(plan: Plan, x: Tensor) -> bool:
    """Whether backward will come to this block; an exported program has the ops of inference."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    if x.requires_grad or isinstance(plan, SqueezeExcitePlan):
        return True
    parameters = [t for weight, bn, *_ in plan.layers(x.shape) for t in (weight, bn.gamma, bn.beta)]
    return any(t.requires_grad for t in (*parameters, *(getattr(plan, "se", None) or ())[:4]))


def _train(plan: Plan, x: Tensor, backend: str) -> Tensor | None:
    """The result with gradients, or by statistics of the batch, with running statistics updated.

    BatchNorms in eval mode normalise by their running statistics. None as ``fuse``, and where torch has to raise.
    """
    layers, dtype = plan.layers(x.shape), _dtype(x)
    if not layers or (torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.is_inference()):
        return None  # of tensors from inference mode nothing may be kept for backward: torch's own error
    if x.dim() != 4 or not serves(backend, "conv_block_train", place(x), dtype):
        return None
    size, counts = list(x.shape), []
    for i, (layer, norm) in enumerate(zip(layers, plan.norms, strict=True)):
        size = layer.output_size(size)
        counts.append(size[0] * size[2] * size[3])
        if counts[i] <= int(norm.training):  # nothing to compute, or nothing to take statistics of: torch's own error
            return None
        layers[i] = layer._replace(frozen=not norm.training)
    shortcut, drop_path = getattr(plan, "shortcut", False), getattr(plan, "drop_path", None)
    residual = x if shortcut and drop_path is None and dtype == x.dtype else None
    se, pool = getattr(plan, "se", None), getattr(plan, "pool", False)
    y, statistics = conv_block(x, layers, se, residual=residual, pool=pool, backend=backend)
    for norm, measured, values in zip(plan.norms, statistics, counts, strict=True):
        if norm.training and norm.track_running_stats:
            update_running_statistics(norm, measured, values)
    return _add_shortcut(y, x, drop_path) if shortcut and residual is None else y


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x runs in."""
    return autocast_dtype(x) or x.dtype


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
