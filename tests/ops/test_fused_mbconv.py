"""``fused_mbconv`` on every backend against its float64 reference."""

import pytest
import torch
from hypothesis import assume, given

from tests.ops import oracle
from tests.ops.cases import DTYPES, EXAMPLES, Fused, drawn, fits, grid
from tests.ops.inputs import build, serves


@pytest.mark.parametrize(("case", "dtype"), grid(Fused))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_grid(case, dtype, backend, problem):
    serves(backend, "fused_mbconv", dtype)
    oracle.check(problem(case, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
@EXAMPLES
@given(case=drawn(Fused))
@torch.no_grad()
def test_any_shape(case, dtype, backend):
    assume(fits(case, dtype))
    serves(backend, "fused_mbconv", dtype)
    oracle.check(build(case, dtype), backend)
