"""Every op in CUDA against its float64 reference, by the criterion of docs/numerics.md."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from effnet_kernels.ops.native_cuda import KERNELS, STRIDES
from tests.ops import oracle
from tests.ops.cases import (
    DTYPES,
    KINDS,
    Case,
    Depthwise,
    MBConv,
    Squeeze,
    SqueezeGate,
    drawn,
    few_cells,
    fits,
    hostile,
    real,
)
from tests.ops.device import native
from tests.ops.inputs import build


def compiled(case: Case) -> bool:
    return not isinstance(case, (Depthwise, MBConv)) or (case.kernel in KERNELS and case.stride in STRIDES)


HOSTILE = [case for kind in KINDS for case in hostile(kind) if compiled(case)]
REAL = [*real(Depthwise)[:8:3], *real(Squeeze), *real(SqueezeGate)]


@pytest.mark.parametrize(("case", "dtype"), few_cells([*HOSTILE, *REAL]))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_grid(case, dtype):
    oracle.check(native(build(case, dtype)), "cuda")


@pytest.mark.parametrize("kind", [Depthwise, Squeeze], ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("poison")
@given(data=st.data())
@torch.no_grad()
def test_any_shape(kind, data):
    case = data.draw(drawn(kind))
    dtype = data.draw(st.sampled_from(DTYPES))
    assume(compiled(case) and fits(case, dtype))
    oracle.check(native(build(case, dtype)), "cuda")
