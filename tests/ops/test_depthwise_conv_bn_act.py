"""``depthwise_conv_bn_act`` on every backend against its float64 reference."""

import pytest
import torch
from hypothesis import assume, given

from tests.ops import oracle
from tests.ops.cases import DTYPES, EXAMPLES, Depthwise, drawn, fits, grid
from tests.ops.inputs import build, serves


@pytest.mark.parametrize(("case", "dtype"), grid(Depthwise))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_grid(case, dtype, backend, problem):
    serves(backend, "depthwise_conv_bn_act", dtype)
    oracle.check(problem(case, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
@EXAMPLES
@given(case=drawn(Depthwise))
@torch.no_grad()
def test_any_shape(case, dtype, backend):
    assume(fits(case, dtype))
    serves(backend, "depthwise_conv_bn_act", dtype)
    oracle.check(build(case, dtype), backend)
