"""An op as a chain of steps, and what its result may differ by.

Three things read a chain:

* ``stock`` runs it with the layers that stock models use, in the dtype of its tensors;
* ``noise`` propagates the variance of rounding errors through it, in float64;
* ``check`` compares a backend's results with the op's float64 reference and allows, per channel,
  twice the error of ``stock`` plus three standard deviations of ``noise``.

What is right is the float64 reference alone. ``stock`` only says how far from it one may be (tests/criterion.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.functional import BatchNorm, SqueezeExciteWeights
from tests.criterion import assert_close, conv2d, unit_roundoff


class Conv(NamedTuple):
    """Pad, convolve (as many groups as the weight says), normalise, activate."""

    weight: Tensor
    bn: BatchNorm
    act: str
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right


class Mean(NamedTuple):
    """Report the channel means [N, C] as an output of their own; ``replace`` makes them the map."""

    replace: bool


class Gate(NamedTuple):
    """The squeeze-excite gate of the map; ``scale`` multiplies it in, otherwise it replaces the map."""

    se: SqueezeExciteWeights
    scale: bool


class Scale(NamedTuple):
    gate: Tensor  # [N, C]


class Add(NamedTuple):
    residual: Tensor


Step = Conv | Mean | Gate | Scale | Add

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.nn.Identity(),
    "relu": torch.nn.ReLU(),
    "relu6": torch.nn.ReLU6(),
    "silu": torch.nn.SiLU(),
    "hardswish": torch.nn.Hardswish(),
    "sigmoid": torch.nn.Sigmoid(),
    "hardsigmoid": torch.nn.Hardsigmoid(),
}


def convolve(x: Tensor, weight: Tensor, step: Conv) -> Tensor:
    top, bottom, left, right = step.padding
    groups = x.shape[1] // weight.shape[1]
    return conv2d(F.pad(x, (left, right, top, bottom)), weight, stride=step.stride, groups=groups)


def stock(x: Tensor, steps: Sequence[Step]) -> list[Tensor]:
    """The chain as stock layers compute it, one rounding to the dtype of x behind every layer."""
    outputs = []
    for step in steps:
        match step:
            case Conv(weight, bn, act):
                y = convolve(x, weight, step)
                y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.gamma, bn.beta, False, 0.0, bn.eps)
                x = ACTIVATION[act](y)
            case Mean(replace):
                mean = x.mean((2, 3))
                if replace:
                    x = mean
                else:
                    outputs.append(mean)
            case Gate(se, scale):
                w_reduce, b_reduce, w_expand, b_expand = (t.to(x.dtype) for t in se[:4])
                y = x.mean((2, 3), keepdim=True) if x.dim() == 4 else x[:, :, None, None]
                y = ACTIVATION[se.act](conv2d(y, w_reduce, b_reduce))
                gate = ACTIVATION[se.gate](conv2d(y, w_expand, b_expand))
                x = x * gate if scale else gate.flatten(1)
            case Scale(gate):
                x = x * gate[:, :, None, None].to(x.dtype)
            case Add(residual):
                x = x + residual
    return [x, *outputs]


def noise(x: Tensor, steps: Sequence[Step], dtype: torch.dtype) -> list[Tensor]:
    """Standard deviation of the rounding errors in every output; x and steps in float64.

    ``u`` rounds what is handed from layer to layer in ``dtype``, ``e`` what happens inside a layer.
    The terms are derived one by one in docs/numerics.md.
    """
    u = unit_roundoff(dtype)
    e = min(u, unit_roundoff(torch.float32))
    y, v, outputs = x, torch.zeros_like(x), []

    def mean(y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        m = y.mean((2, 3))
        return m, v.mean((2, 3)) + e**2 * ((y**2).mean((2, 3)) + y.shape[2] * y.shape[3] * m**2)

    def dot(y: Tensor, v: Tensor, conv: Callable[[Tensor, Tensor], Tensor], w: Tensor) -> tuple[Tensor, Tensor]:
        z, length = conv(y, w), w[0].numel()
        return z, conv(v, w**2) + e**2 * length * (conv(y**2, w**2) + z**2)

    def activate(z: Tensor, v: Tensor, act: str) -> tuple[Tensor, Tensor]:
        f, reach = ACTIVATION[act], 3 * torch.sqrt(v)
        y = f(z)
        spread = torch.maximum((f(z + reach) - y).abs(), (f(z - reach) - y).abs()) / 3
        return y, spread**2 + 16 * e**2 * y**2

    for step in steps:
        match step:
            case Conv(weight, bn, act):
                y, v = dot(y, v, lambda a, w, step=step: convolve(a, w, step), weight)
                v = v + u**2 * y**2
                gamma, beta, running_mean, running_var = (t[:, None, None] for t in bn[:4])
                s = gamma / torch.sqrt(running_var + bn.eps)
                v = s**2 * v + 4 * e**2 * ((s * y) ** 2 + (s * running_mean) ** 2 + beta**2)
                y = s * (y - running_mean) + beta
                y, v = activate(y, v, act)
                v = v + u**2 * y**2
            case Mean(replace):
                m, vm = mean(y, v)
                if replace:
                    y, v = m, vm + u**2 * m**2
                else:
                    outputs.append(vm)
            case Gate(se, scale):
                g, vg = mean(y, v) if y.dim() == 4 else (y, v)
                for w, b, act in ((se.w_reduce, se.b_reduce, se.act), (se.w_expand, se.b_expand, se.gate)):
                    g, vg = dot(g, vg, F.linear, w.flatten(1))
                    g, vg = activate(g + b, vg + e**2 * ((g + b) ** 2 + b**2), act)
                if scale:
                    g, vg = g[:, :, None, None], (vg + u**2 * g**2)[:, :, None, None]
                    y, v = y * g, g**2 * v + y**2 * vg + u**2 * (y * g) ** 2
                else:
                    y, v = g, vg + u**2 * g**2
            case Scale(gate):
                g = gate[:, :, None, None]
                y, v = y * g, g**2 * v + 2 * u**2 * (y * g) ** 2
            case Add(residual):
                y = y + residual
                v = v + u**2 * y**2
    return [torch.sqrt(v) for v in (v, *outputs)]


def assert_layout(name: str, got: Tensor, inputs: Sequence[Tensor]) -> None:
    """Maps are dense channels-last, vectors dense, and no output shares memory with an input."""
    if got.dim() == 4:
        _, c, h, w = got.shape
        strides: tuple[int, ...] = (h * w * c, 1, w * c, c)
    else:
        strides = (got.shape[1], 1)
    assert got.stride() == strides, f"{name}: strides {got.stride()}, expected {strides}"
    for tensor in inputs:
        if got.numel() and tensor.numel():
            assert got.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr(), f"{name} aliases an input"


def check(problem: Any, backend: str) -> tuple[Tensor, ...]:
    """Run ``problem`` (an ``inputs.Problem``) on ``backend``, compare every output, and return them."""
    outputs = problem.call(backend)
    for name, got, expected in zip(problem.outputs, outputs, problem.expected, strict=True):
        assert got.dtype == expected.dtype, f"{name}: {got.dtype}, expected {expected.dtype}"
        assert_layout(name, got, problem.tensors)
        assert_close(name, got, expected.exact, expected.allowed)
    return outputs
