"""From a case to tensors: the call of the op, the same thing in stock layers, and what it may differ by."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from effnet_kernels import functional
from effnet_kernels.functional import BatchNorm, ConvBN, SqueezeExciteWeights
from tests import criterion
from tests.ops import oracle
from tests.ops.cases import DTYPES, Case, Depthwise, Fused, MBConv, Pointwise, Squeeze, SqueezeGate
from tests.thinning import daily


class Expected(NamedTuple):
    exact: Tensor
    allowed: Tensor  # per channel
    dtype: torch.dtype


@dataclasses.dataclass
class Problem:
    """One call of a public function, ``function(*args, **kwargs)``, and its chain of stock layers."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    steps: list[oracle.Step]
    outputs: tuple[str, ...] = ("y",)
    wide_outputs: tuple[str, ...] = ()  # those that are float32 for 16-bit maps

    def call(self, backend: str, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        args, kwargs = (self.args, self.kwargs) if dtype is None else cast((self.args, self.kwargs), dtype)
        result = self.function(*args, **kwargs, backend=backend)
        return result if isinstance(result, tuple) else (result,)

    @property
    def x(self) -> Tensor:
        return self.args[0]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @functools.cached_property
    def expected(self) -> list[Expected]:
        """The op's reference in float64, with the tolerance around it."""
        dtype = self.x.dtype
        exact = self.call("reference", torch.float64)
        if self.x.shape[0] == 0:  # stock layers and maxima have nothing to say
            allowed = [torch.zeros(y.shape[1], dtype=torch.float64) for y in exact]
        else:
            rounded = oracle.stock(self.x, self.steps)
            sigma = oracle.noise(self.x.double(), cast(self.steps, torch.float64), dtype)
            allowed = [criterion.tolerance(*each, dtype) for each in zip(exact, rounded, sigma, strict=True)]
        dtypes = [torch.float32 if name in self.wide_outputs else dtype for name in self.outputs]
        return [Expected(*each) for each in zip(exact, allowed, dtypes, strict=True)]


def cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) else leaf, tree)


class Draw:
    """Random tensors for one case, the same on every run. Every value is exact in ``dtype``."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.param_dtype = dtype if case.bn16 else torch.float32
        self.generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * std).to(self.dtype)

    def uniform(self, *shape: int, low: float, high: float) -> Tensor:
        return (low + torch.rand(shape, generator=self.generator) * (high - low)).to(self.dtype)

    def map(self, n: int, c: int, h: int, w: int, layout: str | None = None, std: float = 1.0) -> Tensor:
        return laid_out(self.normal(n, c, h, w, std=std), layout or self.case.layout)

    def x(self, channels: int) -> Tensor:
        return self.map(self.case.n, channels, *self.case.hw, std=3e3 if self.case.values == "large" else 1.0)

    def param(self, values: Tensor) -> Tensor:
        """A vector or matrix as the case wants its parameters: dense, or every second element of a buffer."""
        if self.case.params == "dense":
            return values
        return torch.stack([values, torch.full_like(values, math.nan)], dim=-1)[..., 0]

    def weight(self, *shape: int) -> Tensor:
        return self.param(self.normal(*shape, std=math.sqrt(2 / math.prod(shape[1:]))))

    def bn(self, c: int, eps: float = 1e-5) -> BatchNorm:
        sign = torch.randint(0, 2, (c,), generator=self.generator) * 2 - 1  # negative gammas happen
        gamma = self.uniform(c, low=0.5, high=1.5) * sign
        beta = self.normal(c, std=0.3)
        var = 10 ** self.uniform(c, low=-1, high=1).float()
        if self.case.values == "saturated":
            beta = beta + 100 * torch.sign(beta)
        if self.case.values == "tiny_var":
            var = 1e-12 * (torch.arange(c) % 2)
        tensors = (gamma, beta, self.normal(c, std=0.5), var.to(self.dtype))
        return BatchNorm(*(self.param(t.to(self.dtype).to(self.param_dtype)) for t in tensors), eps)

    def conv_bn(self, *shape: int, eps: float = 1e-5) -> ConvBN:
        return ConvBN(self.weight(*shape), self.bn(shape[0], eps))

    def se(self, c: int, reduced: int, act: str, gate: str) -> SqueezeExciteWeights:
        tensors = (
            self.normal(reduced, c, 1, 1, std=math.sqrt(2 / c)),
            self.normal(reduced),
            self.normal(c, reduced, 1, 1, std=math.sqrt(2 / reduced)),
            self.normal(c),
        )
        return SqueezeExciteWeights(*(self.param(t.to(self.param_dtype)) for t in tensors), act, gate)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x with the strides that ``layout`` names; NaN wherever x's storage holds something else."""
    n, c, h, w = x.shape
    if layout == "nhwc":
        return torch.empty_strided(x.shape, (h * w * c, 1, w * c, c), dtype=x.dtype).copy_(x)
    if layout == "nchw":
        return x
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":  # every image is the first one
        return x[:1].expand(n, c, h, w) if n else x
    assert layout == "sliced"
    base = torch.full((n, c + 3, h + 2, 2 * w), math.nan, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    return base[:, 2 : 2 + c, 1 : 1 + h, ::2].copy_(x)


def build(case: Case, dtype: torch.dtype) -> Problem:
    """The problem of a case."""
    return BUILDERS[type(case)](case, Draw(case, dtype))


def _pointwise(case: Pointwise, draw: Draw) -> Problem:
    x, (weight, bn) = draw.x(case.cin), draw.conv_bn(case.cout, case.cin, 1, 1)
    gate = residual = None
    steps: list[oracle.Step] = []
    if case.gate:
        gate = draw.param(draw.uniform(case.n, case.cin, low=0, high=1).to(draw.param_dtype))
        steps.append(oracle.Scale(gate))
    steps.append(oracle.Conv(weight, bn, case.act))
    if case.residual:
        residual = draw.map(case.n, case.cout, *case.hw, layout=case.residual)
        steps.append(oracle.Add(residual))
    if case.pool:
        steps.append(oracle.Mean(replace=True))
    kwargs = {"gate": gate, "residual": residual, "pool": case.pool}
    return Problem(functional.pointwise_conv_bn_act, (x, weight, bn, case.act), kwargs, steps)


def _depthwise(case: Depthwise, draw: Draw) -> Problem:
    x, (weight, bn) = draw.x(case.c), draw.conv_bn(case.c, 1, *case.kernel)
    steps = [oracle.Conv(weight, bn, case.act, case.stride, case.pads()), oracle.Mean(replace=False)]
    kwargs = {"stride": case.stride, "padding": case.pads()}
    args = (x, weight, bn, case.act)
    return Problem(functional.depthwise_conv_bn_act, args, kwargs, steps, ("y", "mean"), ("mean",))


def _squeeze_excite(case: Squeeze, draw: Draw) -> Problem:
    x, se = draw.x(case.c), draw.se(case.c, case.reduced, case.act, case.gate)
    return Problem(functional.squeeze_excite, (x, se), {}, [oracle.Gate(se, scale=True)])


def _squeeze_excite_gate(case: SqueezeGate, draw: Draw) -> Problem:
    assert draw.dtype == torch.float32
    mean, se = draw.param(draw.normal(case.n, case.c)), draw.se(case.c, case.reduced, case.act, case.gate)
    return Problem(functional.squeeze_excite_gate, (mean, se), {}, [oracle.Gate(se, scale=False)])


def _fused_mbconv(case: Fused, draw: Draw) -> Problem:
    x, expand = draw.x(case.cin), draw.conv_bn(case.mid, case.cin, *case.kernel)
    steps: list[oracle.Step] = [oracle.Conv(expand.weight, expand.bn, case.act, case.stride, case.pads())]
    project = None
    if case.cout is not None:
        project = draw.conv_bn(case.cout, case.mid, 1, 1, eps=1e-3)
        steps.append(oracle.Conv(project.weight, project.bn, "identity"))
    if case.residual:
        steps.append(oracle.Add(x))
    kwargs = {"stride": case.stride, "padding": case.pads(), "residual": case.residual}
    return Problem(functional.fused_mbconv, (x, expand, project, case.act), kwargs, steps)


def _mbconv(case: MBConv, draw: Draw) -> Problem:
    x, mid = draw.x(case.cin), case.cin if case.mid is None else case.mid
    steps: list[oracle.Step] = []
    expand = se = None
    if case.mid is not None:
        expand = draw.conv_bn(mid, case.cin, 1, 1, eps=1e-3)
        steps.append(oracle.Conv(expand.weight, expand.bn, case.act))
    depthwise = draw.conv_bn(mid, 1, *case.kernel)
    steps.append(oracle.Conv(depthwise.weight, depthwise.bn, case.act, case.stride, case.pads()))
    if case.reduced is not None:
        se = draw.se(mid, case.reduced, case.act, case.gate)
        steps.append(oracle.Gate(se, scale=True))
    project = draw.conv_bn(case.cout, mid, 1, 1, eps=1e-3)
    steps.append(oracle.Conv(project.weight, project.bn, case.project_act))
    if case.residual:
        steps.append(oracle.Add(x))
    kwargs = {"stride": case.stride, "padding": case.pads(), "project_act": case.project_act,
              "residual": case.residual}  # fmt: skip
    return Problem(functional.mbconv, (x, expand, depthwise, se, project, case.act), kwargs, steps)


BUILDERS: dict[type[Case], Callable[[Any, Draw], Problem]] = {
    Pointwise: _pointwise,
    Depthwise: _depthwise,
    Squeeze: _squeeze_excite,
    SqueezeGate: _squeeze_excite_gate,
    Fused: _fused_mbconv,
    MBConv: _mbconv,
}
# One small problem per op and option, for the tests that ask how an op behaves rather than what it computes.
SAMPLES: dict[str, Case] = {
    "pointwise_conv_bn_act": Pointwise(hw=(6, 5), cin=8, cout=12, gate=True, residual="nhwc"),
    "pointwise_conv_bn_act-pool": Pointwise(hw=(6, 5), cin=8, cout=12, pool=True),
    "depthwise_conv_bn_act": Depthwise(hw=(6, 5), c=12, stride=(2, 2), padding="tf"),
    "squeeze_excite_gate": SqueezeGate(c=12),
    "squeeze_excite": Squeeze(hw=(6, 5), c=12),
    "fused_mbconv": Fused(hw=(6, 5), cin=8, mid=12, cout=8, residual=True),
    "fused_mbconv-stem": Fused(hw=(6, 5), cin=3, mid=12, cout=None, stride=(2, 2), padding="tf"),
    "mbconv": MBConv(hw=(6, 5), cin=8, mid=12, cout=8, residual=True),
    "mbconv-separable": MBConv(hw=(6, 5), cin=8, mid=None, cout=12, stride=(2, 2), reduced=None),
}


# (name, dtype): means, which the gate gets, are float32.
sample_cells = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{dtype}")
        for name, case in SAMPLES.items()
        for dtype in DTYPES
        if dtype == torch.float32 or not isinstance(case, SqueezeGate)
    ],
)
# Each op once, and the options of an op exhaustively.
each_op = pytest.mark.parametrize("name", daily(SAMPLES, [name for name in SAMPLES if "-" not in name]))


def sample(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Problem:
    return build(dataclasses.replace(SAMPLES[name], **changes), dtype)
