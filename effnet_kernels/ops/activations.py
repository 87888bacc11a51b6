"""The one table of activations and gates, shared by every backend and by backward.

The integer codes are part of the native interface: ``csrc/types.h`` has the same ones.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

CODES: dict[str, int] = {
    "identity": 0,
    "relu": 1,
    "relu6": 2,
    "silu": 3,
    "hardswish": 4,
    "sigmoid": 5,
    "hardsigmoid": 6,
}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": F.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}

# (gradient of f(x), x) -> gradient of x, the choices at the kinks being torch's own.
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda grad, x: grad,
    "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
    "relu6": lambda grad, x: _aten.hardtanh_backward(grad, x, 0, 6),
    "silu": _aten.silu_backward,
    "hardswish": _aten.hardswish_backward,
    "sigmoid": lambda grad, x: _aten.sigmoid_backward(grad, torch.sigmoid(x)),
    "hardsigmoid": _aten.hardsigmoid_backward,
}

ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish")
GATES = ("sigmoid", "hardsigmoid")
