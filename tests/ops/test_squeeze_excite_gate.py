"""``squeeze_excite_gate`` on every backend against its float64 reference."""

import pytest
import torch
from hypothesis import given

from effnet_kernels import functional as F
from effnet_kernels.functional import SqueezeExciteWeights
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_weights_of_a_16_bit_model(dtype, backend):
    """The means of such a model are float32, and so is all that is done with them."""
    problem = build(Squeeze(2, (3, 3), c=20, reduced=6), torch.float32, gate_only=True)
    (mean, se), kwargs = problem.args, problem.kwargs
    narrow = SqueezeExciteWeights(*(t.to(dtype) for t in se[:4]), *se[4:])
    same = SqueezeExciteWeights(*(t.float() for t in narrow[:4]), *se[4:])
    assert torch.equal(
        F.squeeze_excite_gate(mean, narrow, **kwargs, backend=backend),
        F.squeeze_excite_gate(mean, same, **kwargs, backend=backend),
    )
