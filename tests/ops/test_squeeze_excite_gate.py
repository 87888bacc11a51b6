"""``squeeze_excite_gate`` on every backend against its float64 reference."""

import pytest
import torch
from hypothesis import given

from tests.ops import oracle
from tests.ops.cases import EXAMPLES, Squeeze, drawn, hostile, real
from tests.ops.inputs import build, serves


@pytest.mark.parametrize("case", [*real(Squeeze), *hostile(Squeeze)], ids=str)
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_grid(case, backend, problem):
    serves(backend, "squeeze_excite_gate", torch.float32)
    oracle.check(problem(case, torch.float32, gate_only=True), backend)


@pytest.mark.usefixtures("poison")
@EXAMPLES
@given(case=drawn(Squeeze))
@torch.no_grad()
def test_any_shape(case, backend):
    serves(backend, "squeeze_excite_gate", torch.float32)
    oracle.check(build(case, torch.float32, gate_only=True), backend)
