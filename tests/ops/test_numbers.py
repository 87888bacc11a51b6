"""Every op on every build of the CPU kernels against its float64 reference, by the criterion of docs/numerics.md."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from effnet_kernels import functional as F
from effnet_kernels.functional import SqueezeExciteWeights
from tests.ops import oracle
from tests.ops.cases import DTYPES, KINDS, SqueezeGate, cells, drawn, fits, hostile, real
from tests.ops.inputs import build


@pytest.mark.parametrize(("case", "dtype"), [cell for kind in KINDS for cell in cells([*real(kind), *hostile(kind)])])
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_grid(case, dtype, backend, problem):
    oracle.check(problem(case, dtype), backend)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in KINDS for dtype in (DTYPES if kind is not SqueezeGate else DTYPES[:1])],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.usefixtures("poison")
@given(data=st.data())
@torch.no_grad()
def test_any_shape(kind, dtype, backend, data):
    case = data.draw(drawn(kind))
    assume(fits(case, dtype))
    oracle.check(build(case, dtype), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_gate_with_weights_of_16_bits(dtype, backend):
    """The means of such a model are float32, and so is all that is done with them."""
    mean, se = build(SqueezeGate(2, (3, 3), c=20, reduced=6), torch.float32).args
    narrow = SqueezeExciteWeights(*(t.to(dtype) for t in se[:4]), *se[4:])
    same = SqueezeExciteWeights(*(t.float() for t in narrow[:4]), *se[4:])
    got, expected = (F.squeeze_excite_gate(mean, weights, backend=backend) for weights in (narrow, same))
    assert torch.equal(got, expected)
