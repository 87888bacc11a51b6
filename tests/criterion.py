"""What a result may differ by: docs/numerics.md for ops and models, docs/training.md for gradients, written once.

What is right is float64. Whoever computes in fewer bits may have twice the error of stock layers at the same dtype, and
the noise that any implementation may have where stock is right by luck:

* an op, in every channel the largest error: three standard deviations of what ``oracle.noise`` derives (``tolerance``);
* a model's output, its root mean square over the tensor: two roundings, its own and that of the sum before it;
* the gradients of a block: three times the rounding of the map and of the longest sum behind any of them (``of_sums``);
* those of a model, all in one: eight roundings. Each is rounded twice, forward and backward, in convolution, BatchNorm,
  activation and sum; what the block's rule allows for a sum of this length is an order of magnitude more.

Stock says nothing where it is not finite. Its convolutions are computed in float32 at least and rounded, by
``measuring``, for those of 16 bits are not right in every processor's library.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

OUTPUT, GRADIENTS = 2, 8  # roundings


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    function: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """``F.conv2d``, under autocast too: its sums in float32 at least, by ``function`` or torch's, and rounded once."""
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    wide = torch.promote_types(dtype, torch.float32)
    x, weight, bias = (None if t is None else t.to(dtype).to(wide) for t in (x, weight, bias))
    with torch.autocast(device, enabled=False):
        return (function or F.conv2d)(x, weight, bias, *args, **kwargs).to(dtype)


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Where the convolutions of stock modules are ``conv2d``."""
    with mock.patch.object(F, "conv2d", functools.partial(conv2d, function=F.conv2d)):
        yield


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def stock_error(stock: Tensor, exact: Tensor) -> Tensor:
    """|stock - exact|, element by element; all zero, so that it allows nothing, where one of them is not finite."""
    error = (stock.double() - exact).abs()
    return error if error.isfinite().all() else torch.zeros_like(error)


# ---- ops: the largest error in every channel -------------------------------------------------------------------


def per_channel(values: Tensor) -> Tensor:
    """The largest magnitude in every channel: [C] from [N, C] or [N, C, H, W]."""
    return values.abs().transpose(0, 1).flatten(1).amax(1)


def tolerance(exact: Tensor, stock: Tensor, sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """[C]: twice the error of stock, three standard deviations of rounding, and flushed subnormals."""
    return 2 * per_channel(stock_error(stock, exact)) + 3 * per_channel(sigma) + torch.finfo(dtype).tiny


def assert_close(name: str, got: Tensor, exact: Tensor, allowed: Tensor) -> None:
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    assert torch.isfinite(allowed).all(), f"{name}: the tolerance is not finite, so it allows anything"
    assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum()} of {got.numel()} elements not finite"
    error = per_channel(got.double() - exact)
    worst = int((error / allowed).argmax())
    wrong = (error > allowed).nonzero().flatten().tolist()
    assert not wrong, (
        f"{name}: error {error[worst]:.3g} where {allowed[worst]:.3g} is allowed, in channel {worst}; "
        f"wrong channels {wrong[:20]} of {len(error)}"
    )


# ---- models and gradients: the root mean square of the error over a tensor -------------------------------------


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def of_sums(dtype: torch.dtype, length: int) -> float:
    """The noise of gradients, relative to them: of rounding to ``dtype``, and of float32 sums of ``length`` terms."""
    return 3 * (unit_roundoff(dtype) + 2**-24 * length**0.5)


def assert_as_accurate(got: Tensor, stock: Tensor, exact: Tensor, noise: float | None = None, floor: float = 0) -> None:
    """``noise`` is relative to the exact result, that of a model's output unless given; ``floor`` is absolute."""
    noise = OUTPUT * torch.finfo(got.dtype).eps if noise is None else noise
    error, allowed = rms(got - exact), 2 * rms(stock_error(stock, exact)) + noise * rms(exact) + floor
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_gradients(got: list[Tensor], stock: list[Tensor], exact: list[Tensor], noise: float) -> None:
    """The same for each of several tensors. Where one vanishes (nothing passes beta of a normalised map), its scale is
    that of the others."""
    floor = max(rms(e) for e in exact) * 2**-24
    for g, s, e in zip(got, stock, exact, strict=True):
        assert (g.dtype, g.shape) == (s.dtype, s.shape)
        assert_as_accurate(g, s, e, noise, floor)


# ---- the same function -----------------------------------------------------------------------------------------


def assert_same_function(got: Any, expected: Any) -> None:
    """Two ways to compute the same in float32, however exactly: a hundredth of what another layer, stride or statistic
    makes of it, and some hundred times its rounding. Elements near zero are sums of larger terms, whose rounding leaves
    about a hundred thousandth of the largest element."""
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        error, allowed = (a - b).abs(), 1e-4 * b.abs() + 1e-5 * b.abs().max()
        assert (error <= allowed).all(), f"error {(error / allowed).max():.3g} times what is allowed"
