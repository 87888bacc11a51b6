"""The shapes and settings that every op is tested on.

Three sources: ``real`` shapes of the published networks, ``hostile`` ones, and hypothesis (``drawn``).
The hostile factors of an op multiply to 10^5 combinations and more, so a pairwise covering array is taken:
every value of every factor meets every value of every other factor in at least one case, wherever the
combination is valid.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import strategies as st

from effnet_kernels.ops.activations import ACTIVATIONS, GATES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MAPS = ((1, 1), (7, 7), (5, 9), (1, 13), (13, 1), (2, 3))
CHANNELS = (1, 3, 5, 17, 33, 65)
# How a map may lie in memory; see inputs.Draw.map.
LAYOUTS = ("nhwc", "nchw", "sliced", "transposed", "expanded")
# normal; |x| up to 1e4; pre-activations near +-100; running_var of 0 to 1e-12.
VALUES = ("normal", "large", "saturated", "tiny_var")
# Parameters dense, or every second element of a buffer with NaN between.
PARAMS = ("dense", "strided")


@dataclasses.dataclass(frozen=True)
class Case:
    """What all ops share. ``bn16`` keeps BatchNorm and SE parameters in the 16-bit dtype of the map."""

    n: int = 2
    hw: tuple[int, int] = (7, 7)
    act: str = "silu"
    layout: str = "nhwc"
    values: str = "normal"
    params: str = "dense"
    bn16: bool = False

    def valid(self) -> bool:
        return True

    def __str__(self) -> str:
        """The fields that are not at their defaults: the test id."""
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}={getattr(self, f.name)}".replace(" ", "") for f in changed) or "default"


@dataclasses.dataclass(frozen=True)
class Window(Case):
    """A spatial convolution.

    ``padding``: none, same, tf (TensorFlow's SAME), more than the kernel needs; or top, bottom, left, right.
    """

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: str | tuple[int, int, int, int] = "same"

    def pads(self) -> tuple[int, int, int, int]:
        if not isinstance(self.padding, str):
            return self.padding

        def one(size: int, kernel: int, stride: int) -> tuple[int, int]:
            if self.padding == "tf":
                total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
                return total // 2, total - total // 2
            return {"none": (0, 0), "same": ((kernel - 1) // 2,) * 2, "large": (kernel, kernel + 1)}[self.padding]

        (top, bottom), (left, right) = (one(*axis) for axis in zip(self.hw, self.kernel, self.stride, strict=True))
        return top, bottom, left, right

    def valid(self) -> bool:
        top, bottom, left, right = self.pads()
        return self.hw[0] + top + bottom >= self.kernel[0] and self.hw[1] + left + right >= self.kernel[1]

    def keeps_size(self) -> bool:
        top, bottom, left, right = self.pads()
        return self.stride == (1, 1) and (top + bottom + 1, left + right + 1) == self.kernel


@dataclasses.dataclass(frozen=True)
class Pointwise(Case):
    cin: int = 16
    cout: int = 24
    gate: bool = False
    residual: str = ""  # the layout of the residual; none when empty
    pool: bool = False


@dataclasses.dataclass(frozen=True)
class Depthwise(Window):
    c: int = 16


@dataclasses.dataclass(frozen=True)
class Squeeze(Case):
    """``squeeze_excite``; ``act`` stands between its two layers."""

    c: int = 16
    reduced: int = 4
    gate: str = "sigmoid"


@dataclasses.dataclass(frozen=True)
class SqueezeGate(Squeeze):
    """``squeeze_excite_gate``, always float32. The layout and the size of the map do not matter."""


@dataclasses.dataclass(frozen=True)
class Fused(Window):
    cin: int = 16
    mid: int = 64
    cout: int | None = 16  # no projection when None
    residual: bool = False

    def valid(self) -> bool:
        out = self.mid if self.cout is None else self.cout
        return super().valid() and (not self.residual or (self.keeps_size() and out == self.cin))


@dataclasses.dataclass(frozen=True)
class MBConv(Window):
    cin: int = 16
    mid: int | None = 64  # no expansion when None
    cout: int = 16
    reduced: int | None = 4  # no squeeze-excite when None
    gate: str = "sigmoid"
    project_act: str = "identity"
    residual: bool = False

    def valid(self) -> bool:
        return super().valid() and (not self.residual or (self.keeps_size() and self.cout == self.cin))


KINDS = (Pointwise, Depthwise, Squeeze, SqueezeGate, Fused, MBConv)
C = TypeVar("C", bound=Case)

COMMON: dict[str, Sequence[Any]] = {
    "n": (1, 3, 0),
    "hw": MAPS,
    "act": ACTIVATIONS,
    "layout": LAYOUTS,
    "values": VALUES,
    "params": PARAMS,
    "bn16": (False, True),
}
WINDOW = COMMON | {
    "kernel": ((3, 3), (5, 5), (7, 7), (1, 1), (2, 2), (4, 4), (3, 5)),
    "stride": ((1, 1), (2, 2), (3, 3), (1, 2)),
    "padding": ("same", "tf", "none", "large"),
}
FACTORS: dict[type[Case], dict[str, Sequence[Any]]] = {
    Pointwise: COMMON
    | {
        "cin": CHANNELS,
        "cout": CHANNELS,
        "gate": (False, True),
        "residual": ("", "nhwc", "nchw", "sliced"),
        "pool": (False, True),
    },
    Depthwise: WINDOW | {"c": CHANNELS},
    Squeeze: COMMON | {"c": CHANNELS, "reduced": (1, 3, 8, 20), "gate": GATES},
    SqueezeGate: COMMON | {"c": CHANNELS, "reduced": (1, 3, 8, 20), "gate": GATES},
    Fused: WINDOW | {"cin": CHANNELS, "mid": CHANNELS, "cout": (None, *CHANNELS), "residual": (False, True)},
    MBConv: WINDOW
    | {
        "cin": CHANNELS,
        "mid": (None, *CHANNELS),
        "cout": CHANNELS,
        "reduced": (None, 1, 3, 20),
        "gate": GATES,
        "project_act": ACTIVATIONS,
        "residual": (False, True),
    },
}


def hostile(kind: type[C]) -> list[C]:
    """A pairwise covering array of the op's factors, greedily grown, the same on every run."""
    factors = FACTORS[kind]
    rng = random.Random(0)
    missing = {
        ((a, va), (b, vb)): None
        for a, b in itertools.combinations(factors, 2)
        for va, vb in itertools.product(factors[a], factors[b])
    }
    cases = []
    while missing:
        first = next(iter(missing))
        candidates = []
        for _ in range(100):
            setting = {name: rng.choice(values) for name, values in factors.items()} | dict(first)
            if kind(**setting).valid():
                candidates.append((setting, [p for p in itertools.combinations(setting.items(), 2) if p in missing]))
            if len(candidates) == 20:
                break
        if not candidates:  # this pair cannot be: a residual with a stride, a kernel larger than the map
            del missing[first]
            continue
        setting, covered = max(candidates, key=lambda candidate: len(candidate[1]))
        cases.append(kind(**setting))
        for pair in covered:
            del missing[pair]
    return cases


def fits(case: Case, dtype: torch.dtype) -> bool:
    """Whether the op has this dtype and the values of the case stay within its range, in stock's intermediates too."""
    if isinstance(case, SqueezeGate):
        return dtype == torch.float32
    return dtype != torch.float16 or case.values in ("normal", "saturated")


def settings_of(case: Case) -> set[tuple]:
    """What a case tries: of an empty batch that it is one, for nothing is computed."""
    return {(type(case), name, value) for name, value in vars(case).items() if case.n or name == "n"}


def dealt(cases: Iterable[Case]) -> list[tuple[Case, torch.dtype]]:
    """A dtype for each case: that in which most of its settings have not come yet."""
    seen: dict[torch.dtype, set] = {dtype: set() for dtype in DTYPES}
    dealt = []
    for case in sorted(cases, key=lambda case: fits(case, torch.float16)):  # last those that can be of any
        settings = settings_of(case)
        fitting = [dtype for dtype in DTYPES if fits(case, dtype)]
        dtype = max(fitting, key=lambda dtype: (len(settings - seen[dtype]), -len(seen[dtype])))
        seen[dtype] |= settings
        dealt.append((case, dtype))
    return dealt


def cells(cases: Iterable[Case]) -> list[Any]:
    """(case, dtype) test parameters: each case in the dtype that it is dealt; in the others it is exhaustive."""
    return [
        pytest.param(case, dtype, marks=[pytest.mark.exhaustive] * (dtype != first), id=cell_id(case, dtype))
        for case, first in dealt(cases)
        for dtype in DTYPES
        if fits(case, dtype)
    ]


def few_cells(cases: Iterable[Case]) -> list[Any]:
    """Each case in the dtype that it is dealt; what is not needed for every setting, and for every activation in every
    dtype, is exhaustive. For backends that an emulation or an interpreter runs slowly."""
    left = dealt(cases)
    needed = {
        (case, dtype): settings_of(case) | ({(type(case), dtype, case.act)} if case.n else set())
        for case, dtype in left
    }
    missing, few = set().union(*needed.values()), []
    while missing:
        few.append(max(left, key=lambda each: len(needed[each] & missing)))
        missing -= needed[few[-1]]
    marks = {each: [pytest.mark.exhaustive] * (each not in few) for each in left}
    return [pytest.param(*each, marks=marks[each], id=cell_id(*each)) for each in left]


def cell_id(case: Case, dtype: torch.dtype) -> str:
    return f"{type(case).__name__}-{str(dtype)[6:]}-{case}"


def drawn(kind: type[C]) -> st.SearchStrategy[C]:
    """Any case of the op, sizes bounded; shrinks towards few images, pixels and channels."""
    channels = st.integers(1, 70)
    free: dict[str, st.SearchStrategy[Any]] = {
        "n": st.integers(0, 4),
        "hw": st.tuples(st.integers(1, 20), st.integers(1, 20)),
        "kernel": st.tuples(st.integers(1, 7), st.integers(1, 7)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        **dict.fromkeys(("c", "cin", "reduced"), channels),
    }
    for name, values in FACTORS[kind].items():
        if name in ("mid", "cout"):
            free[name] = st.none() | channels if None in values else channels
        elif name == "reduced" and None in values:
            free[name] = st.none() | channels
        elif name not in free:
            free[name] = st.sampled_from(list(values))
    return st.builds(kind, **{name: free[name] for name in FACTORS[kind]}).filter(lambda case: case.valid())


# Real shapes. Maps keep their published extent where that is cheap, else the next smaller of
# 56, 28, 14, 7; channel counts are never scaled. (channels, kernel, stride, map)
DEPTHWISE_SHAPES = {
    "b0": [(32, 3, 1, 56), (96, 3, 2, 112), (144, 5, 2, 56), (240, 3, 2, 28), (480, 5, 1, 14), (672, 5, 2, 14),
           (1152, 5, 1, 7), (1152, 3, 1, 7)],
    "b4": [(48, 3, 1, 56), (24, 3, 1, 95), (192, 5, 2, 48), (336, 3, 2, 24), (960, 5, 2, 24), (1632, 5, 1, 12)],
    "b7": [(64, 3, 1, 75), (288, 3, 1, 38), (1344, 5, 2, 19), (2304, 5, 1, 10), (3840, 3, 1, 7)],
    "v2_s": [(256, 3, 2, 24), (960, 3, 2, 12), (1536, 3, 1, 10)],
    "v2_l": [(2304, 3, 1, 7), (3840, 3, 1, 4)],
}  # fmt: skip
# (channels in, channels out, map)
POINTWISE_SHAPES = {
    "b0": [(32, 16, 56), (16, 96, 56), (144, 40, 28), (480, 112, 14), (192, 1152, 7), (1152, 320, 7), (320, 1280, 7)],
    "b4": [(32, 192, 48), (272, 1632, 12), (448, 1792, 12)],
    "b7": [(48, 288, 38), (640, 2560, 5), (3840, 640, 5)],
    "v2_s": [(160, 960, 12), (1536, 256, 10)],
}
# (in, mid, out, kernel, stride, map, reduced, residual)
MBCONV_SHAPES = {
    "b0": [(32, None, 16, 3, 1, 56, 8, False), (16, 96, 24, 3, 2, 112, 4, False), (24, 144, 24, 3, 1, 56, 6, True),
           (24, 144, 40, 5, 2, 56, 6, False), (80, 480, 80, 3, 1, 14, 20, True), (80, 480, 112, 5, 1, 14, 20, False),
           (192, 1152, 192, 5, 1, 7, 48, True), (192, 1152, 320, 3, 1, 7, 48, False)],
    "b3": [(232, 1392, 232, 5, 1, 10, 58, True)],
    "b4": [(24, None, 24, 3, 1, 48, 6, True), (112, 672, 160, 5, 1, 24, 28, False)],
    "b7": [(384, 2304, 640, 5, 2, 10, 96, False), (640, 3840, 640, 3, 1, 7, 160, True)],
    # 19 pixels are tiles of different heights in every build.
    "v2_s": [(64, 256, 128, 3, 2, 24, 16, False), (128, 512, 128, 3, 1, 19, 32, True),
             (256, 1536, 256, 3, 1, 10, 64, True)],
    # Without squeeze-excite large maps are done in bands of rows.
    "mobilenet_v2": [(32, None, 16, 3, 1, 112, None, False), (24, 144, 24, 3, 1, 56, None, True),
                     (24, 144, 40, 5, 2, 75, None, False), (32, 192, 32, 3, 1, 28, None, True)],
}  # fmt: skip
# (in, mid, out, kernel, stride, map, residual)
FUSED_SHAPES = {
    "stem": [(3, 32, None, 3, 2, 112, False), (3, 40, None, 3, 2, 75, False)],
    "v2_s": [(24, 24, None, 3, 1, 56, True), (24, 96, 48, 3, 2, 56, False), (48, 192, 48, 3, 1, 28, True),
             (48, 192, 64, 3, 2, 28, False), (64, 256, 64, 3, 1, 24, True)],
    "v2_l": [(32, 128, 64, 3, 2, 28, False), (96, 384, 96, 3, 1, 14, True)],
    "el": [(32, 192, 40, 5, 2, 28, False)],
}  # fmt: skip


def real(kind: type[Case]) -> list[Case]:
    """Shapes of the published networks; "v2" and "b4" with TensorFlow padding, "mobilenet" with ReLU6."""

    def rest(model: str) -> dict[str, Any]:
        return {
            "act": "relu6" if model.startswith("mobilenet") else "silu",
            "padding": "tf" if model[:2] in ("v2", "b4") else "same",
        }

    cases: list[Case] = []
    if kind is Pointwise:
        for model, shapes in POINTWISE_SHAPES.items():
            for cin, cout, size in shapes:
                expands, head = cout > 3 * cin, cout in (1280, 1792, 2560)
                act = "silu" if expands else "identity"
                residual = "" if expands or model == "b4" else "nhwc"
                cases.append(Pointwise(1, (size, size), act, cin=cin, cout=cout, pool=head, gate=not expands,
                                       residual=residual))  # fmt: skip
    elif kind is Depthwise:
        for model, shapes in DEPTHWISE_SHAPES.items():
            for c, k, s, size in shapes:
                cases.append(Depthwise(1, (size, size), kernel=(k, k), stride=(s, s), c=c, **rest(model)))
    elif issubclass(kind, Squeeze):
        for c, reduced in ((32, 8), (96, 4), (480, 20), (1152, 48), (3840, 160)):
            cases.append(kind(2, (7, 7), c=c, reduced=reduced))
    elif kind is Fused:
        for model, shapes in FUSED_SHAPES.items():
            for cin, mid, cout, k, s, size, residual in shapes:
                cases.append(Fused(1, (size, size), kernel=(k, k), stride=(s, s), cin=cin, mid=mid, cout=cout,
                                   residual=residual, **rest(model)))  # fmt: skip
    else:
        for model, shapes in MBCONV_SHAPES.items():
            for cin, mid, cout, k, s, size, reduced, residual in shapes:
                cases.append(MBConv(1, (size, size), kernel=(k, k), stride=(s, s), cin=cin, mid=mid, cout=cout,
                                    reduced=reduced, residual=residual, **rest(model)))  # fmt: skip
    return cases
