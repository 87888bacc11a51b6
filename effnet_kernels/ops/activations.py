"""The one table of activations and gates, shared by every backend and by backward.

The integer codes are part of the native interface: ``csrc/cpu/common.h`` has the same enum.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

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

ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish")
GATES = ("sigmoid", "hardsigmoid")
