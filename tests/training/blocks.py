"""Blocks in training: random problems, and the same thing in stock layers.

The exact gradients are those of the stock layers in float64, on the same, already rounded tensors.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from effnet_kernels.functional import BatchNorm, SqueezeExciteWeights
from effnet_kernels.ops.activations import FUNCTIONS
from effnet_kernels.training import ConvBNAct, conv_block
from tests.criterion import assert_gradients, conv2d, of_sums
from tests.ops.device import on_device


@dataclasses.dataclass(frozen=True)
class Case:
    """``widths``: channels of the input and of every layer. ``kinds``: p(ointwise), d(epthwise) or f(ull)."""

    kinds: str = "pdp"
    widths: tuple[int, ...] = (5, 17, 17, 7)
    n: int = 2
    hw: tuple[int, int] = (7, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    act: str = "silu"
    last_act: str = "identity"
    se: bool = False
    residual: bool = False
    pool: bool = False
    frozen: str = ""  # which layers: a subset of their indices as digits
    scale: float = 1.0

    def __str__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}={getattr(self, f.name)}".replace(" ", "") for f in changed) or "default"


CASES = [
    Case(),
    Case(se=True),
    Case(se=True, widths=(33, 65, 65, 33), residual=True, act="hardswish"),
    Case(kernel=(5, 5), stride=2, padding=(1, 2, 1, 2), hw=(9, 12), se=True, act="relu"),  # TensorFlow's SAME
    Case(kernel=(7, 7), padding=(3, 3, 3, 3), hw=(13, 5), act="relu6"),
    Case(kernel=(3, 5), stride=3, padding=(0, 2, 2, 1), hw=(11, 10)),
    Case(n=1, hw=(1, 3), kernel=(5, 5), padding=(2, 2, 2, 2), se=True),
    Case(n=3, hw=(1, 1), se=True),
    Case(hw=(40, 33), widths=(3, 33, 33, 4), n=1),
    Case(se=True, residual=True, widths=(5, 17, 17, 5), frozen="012"),
    Case(se=True, frozen="1", last_act="silu"),
    Case(frozen="02"),
    Case(kinds="dp", widths=(17, 17, 9), se=True, last_act="relu6"),
    Case(kinds="fp", widths=(5, 18, 7), se=True),
    Case(kinds="fp", widths=(3, 16, 3), residual=True, stride=1),
    Case(kinds="f", widths=(3, 16), stride=2, padding=(0, 1, 0, 1), hw=(15, 14), last_act="silu"),
    Case(kinds="d", widths=(33, 33), kernel=(5, 5), padding=(2, 2, 2, 2), last_act="hardswish"),
    Case(kinds="d", widths=(18, 18), kernel=(1, 2), padding=(0, 0, 0, 1), stride=2),
    Case(kinds="pd", widths=(5, 18, 18), se=True, stride=2),  # a gate in front of a depthwise convolution
    Case(kinds="p", widths=(8, 40), last_act="silu", pool=True),
    Case(kinds="p", widths=(19, 19), last_act="silu", residual=True),
    Case(kinds="p", widths=(19, 19), last_act="silu", frozen="0"),
]


@dataclasses.dataclass
class BlockProblem:
    x: Tensor
    layers: list[ConvBNAct]
    se: SqueezeExciteWeights | None
    residual: Tensor | None
    pool: bool
    grad: Tensor

    def leaves(self) -> list[Tensor]:
        """x, the residual, and the parameters: everything with a gradient."""
        tensors = [self.x] if self.residual is None else [self.x, self.residual]
        for layer in self.layers:
            tensors += [layer.weight, layer.bn.gamma, layer.bn.beta]
        return tensors if self.se is None else [*tensors, *self.se[:4]]

    def to(self, dtype: torch.dtype, vectors: torch.dtype) -> "BlockProblem":
        """A copy with leaves of its own that require gradients; BatchNorm's and SE's tensors in ``vectors``."""

        def leaf(t: Tensor | None, dtype: torch.dtype = dtype) -> Tensor | None:
            return None if t is None else t.detach().to(dtype, copy=True).requires_grad_()

        layers = []
        for layer in self.layers:
            gamma, beta = leaf(layer.bn.gamma, vectors), leaf(layer.bn.beta, vectors)
            mean, var = (t.to(vectors, copy=True) for t in layer.bn[2:4])
            layers.append(layer._replace(weight=leaf(layer.weight), bn=BatchNorm(gamma, beta, mean, var, layer.bn.eps)))
        se = None if self.se is None else SqueezeExciteWeights(*(leaf(t, vectors) for t in self.se[:4]))
        return BlockProblem(leaf(self.x), layers, se, leaf(self.residual), self.pool, self.grad.to(dtype))

    def forward(self, backend: str) -> Tensor:
        """The output through our op."""
        return conv_block(self.x, self.layers, self.se, residual=self.residual, pool=self.pool, backend=backend)[0]

    def on_device(self) -> "BlockProblem":
        """A copy where the kernels of Triton and CUDA run."""
        return BlockProblem(*on_device(tuple(vars(self).values())))

    def run(self, backend: str) -> list[Tensor]:
        """The output and all gradients through our op, on the CPU."""
        there = self.on_device() if backend in ("triton", "cuda") else self
        y = there.forward(backend)
        return [t.cpu() for t in (y, *torch.autograd.grad(y, there.leaves(), there.grad))]

    def stock(self) -> list[Tensor]:
        """The same through stock layers."""
        y = stock(self.x, self.layers, self.se, self.residual, self.pool)
        return [y, *torch.autograd.grad(y, self.leaves(), self.grad)]


def build(case: Case, dtype: torch.dtype = torch.float64) -> BlockProblem:
    """The problem of a case in float64, every number of maps and weights exact in ``dtype``."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype).double()

    layers, widths = [], case.widths
    for i, kind in enumerate(case.kinds):
        c_in, c_out = widths[i], widths[i + 1]
        shape = {"p": (c_out, c_in, 1, 1), "d": (c_out, 1, *case.kernel), "f": (c_out, c_in, *case.kernel)}[kind]
        weight = normal(*shape, std=(2 / (shape[1] * shape[2] * shape[3])) ** 0.5)
        sign = torch.where(torch.arange(c_out) % 3 == 0, -1.0, 1.0).double()
        var = torch.rand(c_out, generator=generator, dtype=torch.float64) + 0.5
        vectors = (sign * (0.5 + var), normal(c_out, std=0.3), normal(c_out, std=0.5), var)
        bn = BatchNorm(*(v.float().double() for v in vectors), 1e-3)
        act = case.last_act if i == len(case.kinds) - 1 else case.act
        spatial = {"stride": case.stride, "padding": case.padding} if kind in "df" else {}
        layers.append(ConvBNAct(weight, bn, act, frozen=str(i) in case.frozen, **spatial))
    x = normal(case.n, widths[0], *case.hw, std=case.scale)
    size = list(x.shape)
    for layer in layers:
        size = layer.output_size(size)
    se = None
    if case.se:
        c = widths[-2]
        tensors = (normal(3, c, 1, 1, std=0.5), normal(3), normal(c, 3, 1, 1), normal(c))
        se = SqueezeExciteWeights(*(t.float().double() for t in tensors))
    residual = normal(*size) if case.residual else None
    return BlockProblem(x, layers, se, residual, case.pool, normal(*(size[:2] if case.pool else size)))


def stock(
    x: Tensor, layers: Sequence[ConvBNAct], se: SqueezeExciteWeights | None, residual: Tensor | None, pool: bool
) -> Tensor:
    """Stock PyTorch layers one after the other, each rounding to the dtype of the map."""
    for i, layer in enumerate(layers):
        if se is not None and i == len(layers) - 1:
            w_reduce, b_reduce, w_expand, b_expand = (t.to(x.dtype) for t in se[:4])
            hidden = F.silu(conv2d(x.mean((2, 3), keepdim=True), w_reduce, b_reduce))
            x = x * conv2d(hidden, w_expand, b_expand).sigmoid()
        top, bottom, left, right = layer.geometry(x.shape)[1]
        groups = x.shape[1] if layer.weight.shape[1] == 1 != x.shape[1] else 1
        x = conv2d(F.pad(x, (left, right, top, bottom)), layer.weight, stride=layer.stride, groups=groups)
        gamma, beta, mean, var, eps = layer.bn
        x = F.batch_norm(x, mean.clone(), var.clone(), gamma, beta, not layer.frozen, 0.1, eps)
        x = FUNCTIONS[layer.act](x)
    if residual is not None:
        x = x + residual
    return x.mean((2, 3)) if pool else x


def batch_norm_act(
    x: Tensor, bn: BatchNorm, act: str = "silu", *, frozen: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """BatchNorm and activation behind a convolution that changes nothing, and the statistics."""
    weight = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, :, None, None]
    y, (statistics,) = conv_block(x, [ConvBNAct(weight, bn, act, frozen=frozen)], backend=backend)
    return y, statistics


def longest_sum(problem: BlockProblem) -> int:
    """Terms of the longest sum behind any gradient: over all pixels, or over the inputs of a convolution."""
    size, longest = list(problem.x.shape), 1
    for layer in problem.layers:
        window = max(layer.weight[0].numel(), layer.weight.shape[0])
        longest = max(longest, size[0] * size[2] * size[3], window)
        size = layer.output_size(size)
    return longest


def assert_as_accurate(problem: BlockProblem, dtype: torch.dtype, backend: str) -> None:
    """Output and gradients of ``backend`` at ``dtype`` against those of stock layers in float64."""
    exact = problem.to(torch.float64, torch.float64).stock()
    rounded = problem.to(dtype, torch.float32)
    assert_gradients(rounded.run(backend), rounded.stock(), exact, of_sums(dtype, longest_sum(problem)))


def cells(cases: Sequence[Case], dtypes: Sequence[torch.dtype]) -> list[Any]:
    """(case, dtype) test parameters; in 16 bits those of smooth activations.

    A derivative that jumps has no neighbourhood: which side a value is rounded to is luck, stock's and ours.
    """
    return [
        pytest.param(case, dtype, id=f"{str(dtype)[6:]}-{case}")
        for case in cases
        for dtype in dtypes
        if dtype == torch.float32 or not {case.act, case.last_act} & {"relu", "relu6", "hardswish"}
    ]


def assert_memory_does_not_matter(problem: BlockProblem, backend: str) -> None:
    """Hooks on saved tensors may copy them, as ``save_on_cpu(pin_memory=True)`` does, which drops strides."""
    expected = problem.run(backend)[1:]
    for layout in (torch.contiguous_format, torch.channels_last):
        with saved_tensors_hooks(lambda t: t, lambda t, layout=layout: _copy(t, layout)):
            y = problem.forward(backend)
        gradients = torch.autograd.grad(y, problem.leaves(), problem.grad)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def _copy(t: Tensor, layout: torch.memory_format) -> Tensor:
    """In that layout or, of vectors and matrices, in every second element of a buffer."""
    if t.dim() == 4:
        return t.clone(memory_format=layout)
    return t.new_full((*t.shape, 2), torch.nan)[..., 0].copy_(t)
