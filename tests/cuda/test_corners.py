"""Shapes drawn over the corners of how the kernels cut a problem, the same ones on every run.

Small maps, of which a block takes several images; rows left over below the last window; padding of every side on its
own, or none; more images than a block takes.
"""

import random

import pytest
import torch

from tests.cuda.tools import check
from tests.ops.cases import DTYPES, Case, Depthwise, Fused, MBConv, Pointwise, fits
from tests.thinning import daily

TILE = 128  # pixels: as many images as fill it share a block


def drawn(kind: type[Case], count: int) -> list[Case]:
    """Different cases of an op; every other one has rows or columns left over at stride 2."""
    rng = random.Random(kind.__name__)
    cases: list[Case] = []
    while len(cases) < count:
        hw = rng.randint(1, 11), rng.randint(1, 11)
        together = max(1, TILE // (hw[0] * hw[1]))
        n = rng.choice([2, 3, together, together + 1, 2 * together + 1])
        setting = {"n": min(n, 40), "hw": hw, "act": rng.choice(["silu", "relu6", "identity"])}
        if kind is not Pointwise:
            kernel, left_over = rng.choice([3, 5]), len(cases) % 2 == 1
            stride = 2 if left_over else rng.choice([1, 2])
            pads = tuple(rng.choice([0, 0, rng.randint(0, kernel)]) for _ in range(4))
            setting |= {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "padding": pads}
            rest = [(size + pads[2 * i] + pads[2 * i + 1] - kernel) % stride for i, size in enumerate(hw)]
            if left_over and not any(rest):
                continue
        channels = {name: rng.choice([3, 8, 20, 34]) for name in ("c", "cin", "mid", "cout") if hasattr(kind, name)}
        case = kind(**setting, **channels)
        if case.valid():
            cases.append(case)
    return cases


CASES = [
    (case, DTYPES[i % 3])
    for kind, count in ((MBConv, 45), (Depthwise, 12), (Fused, 15), (Pointwise, 9))
    for i, case in enumerate(drawn(kind, count))
    if fits(case, DTYPES[i % 3])
]


@pytest.mark.parametrize(("case", "dtype"), daily(CASES, CASES[::2]))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_corners(case, dtype, emulation):
    check(case, dtype, emulation, seeds=1)
