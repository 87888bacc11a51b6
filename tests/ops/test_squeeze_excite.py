"""``squeeze_excite`` on every backend against its float64 reference."""

import pytest
import torch
from hypothesis import assume, given

from tests.ops import oracle
from tests.ops.cases import DTYPES, EXAMPLES, Squeeze, drawn, fits, grid
from tests.ops.inputs import build, serves


@pytest.mark.parametrize(("case", "dtype"), grid(Squeeze))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_grid(case, dtype, backend, problem):
    serves(backend, "squeeze_excite", dtype)
    oracle.check(problem(case, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
@EXAMPLES
@given(case=drawn(Squeeze))
@torch.no_grad()
def test_any_shape(case, dtype, backend):
    assume(fits(case, dtype))
    serves(backend, "squeeze_excite", dtype)
    oracle.check(build(case, dtype), backend)
