"""Does a result agree with the float64 result as well as stock PyTorch does at the same dtype?

The criterion of the whole project: the largest error is at most twice stock's, plus a few units in the
last place of the dtype at the scale of the result, below which errors are the luck of one rounding. Where
stock's result is not finite it is no measure, and those few units alone are allowed.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

FACTOR = 2.0
ULPS = 4


class Agreement(NamedTuple):
    """Largest absolute errors against float64, and the bound on ours."""

    error: float
    stock_error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN

    @property
    def ratio(self) -> float:
        if self.stock_error == 0:
            return 0.0 if self.error == 0 else float("inf")
        return self.error / self.stock_error


IMAGES = 16  # evaluated at once in float64, which takes four times the memory of float16


def exact_output(stock: nn.Module, x: Tensor) -> Tensor:
    """What ``stock``, in eval mode and with its weights as they are rounded now, gives for ``x`` in float64."""
    with torch.inference_mode():
        exact = copy.deepcopy(stock).double()
        return torch.cat([exact(part.double()) for part in x.split(IMAGES)])


def agreement(output: Tensor, stock_output: Tensor, exact: Tensor) -> Agreement:
    """Compare two results of the same dtype with the float64 one; all of one shape."""
    error, stock_error = max_error(output, exact), max_error(stock_output, exact)
    scale = exact.abs().max().item() if exact.numel() else 0.0
    bound = FACTOR * measure(stock_error) + ULPS * torch.finfo(stock_output.dtype).eps * scale
    return Agreement(error, stock_error, bound)


def measure(stock_error: float) -> float:
    """What an error of stock says of ours: nothing where it is not finite."""
    return stock_error if math.isfinite(stock_error) else 0.0


def max_error(output: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite when the shapes differ."""
    if output.shape != exact.shape:
        return float("inf")
    if not exact.numel():
        return 0.0
    return (output.to(exact.device).double() - exact).abs().max().item()
