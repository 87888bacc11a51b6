"""``mbconv`` on every backend against its float64 reference."""

import pytest
import torch
from hypothesis import assume, given

from tests.ops import oracle
from tests.ops.cases import DTYPES, EXAMPLES, MBConv, drawn, fits, grid
from tests.ops.inputs import build, serves


@pytest.mark.parametrize(("case", "dtype"), grid(MBConv))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_grid(case, dtype, backend, problem):
    serves(backend, "mbconv", dtype)
    oracle.check(problem(case, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
@EXAMPLES
@given(case=drawn(MBConv))
@torch.no_grad()
def test_any_shape(case, dtype, backend):
    assume(fits(case, dtype))
    serves(backend, "mbconv", dtype)
    oracle.check(build(case, dtype), backend)
