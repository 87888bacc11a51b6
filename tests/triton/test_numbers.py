"""Every Triton kernel against the float64 reference, by the criterion of docs/numerics.md.

Cases are dealt out over the dtypes: interpreting all of them three times would take longer than the rest of the suite.
``mbconv`` is made of the others' kernels, so every third of its cases has to do.
"""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from effnet_kernels.ops.activations import ACTIVATIONS
from tests.ops import oracle
from tests.ops.cases import (
    DTYPES,
    KINDS,
    Case,
    Depthwise,
    MBConv,
    Pointwise,
    Squeeze,
    drawn,
    few_cells,
    fits,
    hostile,
)
from tests.ops.device import native
from tests.ops.inputs import build
from tests.ops.special_values import (
    check_activation,
    check_depthwise_mean,
    check_squeeze_in_float16,
    check_value,
    each_step,
)
from tests.thinning import in_turns

HOSTILE = [case for kind in KINDS for case in hostile(kind)[:: 3 if kind is MBConv else 1]]
# More than one tile each way, and every class of tiles.
TILED = [
    Depthwise(2, (5, 18), c=72, kernel=(3, 3)),
    Depthwise(1, (9, 17), c=40, kernel=(5, 5)),
    Depthwise(1, (9, 34), c=24, kernel=(5, 5), stride=(2, 2), padding="tf"),
    Depthwise(1, (3, 9), c=672, kernel=(3, 3)),
    Squeeze(2, (9, 31), c=130, reduced=6),
    Squeeze(2, (5, 3), c=300, reduced=34),
    Squeeze(1, (3, 3), c=700, reduced=150),
    MBConv(2, (9, 18), cin=8, mid=48, cout=8, residual=True),
]


@pytest.mark.parametrize(("case", "dtype"), few_cells([*HOSTILE, *TILED]))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_grid(case, dtype):
    oracle.check(native(build(case, dtype)), "triton")


@pytest.mark.parametrize("kind", [Depthwise, Squeeze, Pointwise], ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("poison")
@settings(max_examples=settings.default.max_examples // 5)
@given(data=st.data())
@torch.no_grad()
def test_any_shape(kind, data):
    case: Case = data.draw(drawn(kind))
    dtype = data.draw(st.sampled_from(DTYPES))
    assume(fits(case, dtype))
    if isinstance(case, Depthwise):
        assume(case.n < 3 and case.kernel[0] * case.kernel[1] <= 15)  # the larger the slower, and tested above
    oracle.check(native(build(case, dtype)), "triton")


@each_step
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_activations_over_their_whole_range(act, dtype, step):
    check_activation(act, dtype, "triton", step)


@in_turns(
    "case, value",
    [
        Depthwise(2, (5, 6), c=19, act="relu6"),
        Squeeze(2, (5, 5), c=19),
        Squeeze(2, (5, 5), c=19, reduced=3, act="relu"),  # infinite hidden units beside one that there is not
        Squeeze(2, (5, 5), c=19, reduced=70, act="relu"),
        MBConv(2, (5, 6), cin=17, mid=35, cout=18),
    ],
    [torch.nan, torch.inf, -torch.inf],
)
@torch.no_grad()
def test_a_value_that_is_not_finite_goes_where_stock_lets_it_go(case, value):
    check_value(native(build(case, torch.float32)), value, "triton")


@torch.no_grad()
def test_means_are_summed_in_float32():
    check_depthwise_mean(torch.bfloat16, "triton")
    check_squeeze_in_float16("triton")
