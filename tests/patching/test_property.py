"""Patched equals stock, however it is called, whatever was done to it: hypothesis draws both.

Three models go the same way: a stock one, a patched one, and a stock one in float64. What was done to them and how
they were called is a ``Case``. After every call all that can be seen from outside is compared: exceptions, the results
and what kind of tensors they are, gradients, buffers, the input, and the calls of hooks. Numbers may have twice the
error of stock and eight roundings, as root mean squares over all results, all gradients and all buffers; where one
rounding of input and weights makes more of a difference, twice that is added.

``EFFNET_KERNELS_EXAMPLES=2000 EFFNET_KERNELS_SEED=7 pytest tests/patching/test_property.py`` searches for longer.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from tests.models import BACKENDS
from tests.patching.property.changes import ACTIONS
from tests.patching.property.comparison import DOORS, DTYPES, MODES, Call, Case, Do, check
from tests.patching.property.models import NAMES
from tests.patching.property.states import OF_OURS_NOT, SLOW, _mesh

EXAMPLES = int(os.environ.get("EFFNET_KERNELS_EXAMPLES", settings.default.max_examples))
SEED = os.environ.get("EFFNET_KERNELS_SEED")


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    _mesh.cache_clear()
    dist.destroy_process_group()


LAYOUTS = [
    *["contiguous", "channels_last", "expanded", "sliced", "transposed"] * 3,
    *["negative", "of inference mode", "of inference mode, channels_last", "nested", "unbatched", "parameter"],
]
CALLS = st.builds(
    Call,
    training=st.sampled_from([None, False, True]),
    mode=st.sampled_from([*MODES]),
    autocast=st.sampled_from([False, False, True]),
    layout=st.sampled_from(LAYOUTS),
    size=st.sampled_from([(2, 37, 37), (1, 37, 37), (3, 40, 33), (2, 33, 48), (1, 64, 64), (0, 33, 33), (2, 1, 3)]),
    door=st.sampled_from([*["forward"] * len(DOORS), *DOORS]),
    backend=st.sampled_from(["auto", "auto", *BACKENDS]),
    input_grad=st.booleans(),
    times=st.sampled_from([1, 1, 3, 4]),
)
DOS = st.builds(
    Do,
    what=st.sampled_from([name for name in ACTIONS if name not in SLOW]),
    where=st.integers(0, 60),
    how=st.integers(0, 5),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(["blocks", "blocks", "ours", *NAMES]))
    dtype = draw(st.sampled_from(["float32", "float32", "float32", *DTYPES]))
    steps = draw(st.lists(st.one_of(CALLS, DOS), max_size=5))
    steps = [s for s in steps if not (name == "ours" and isinstance(s, Do) and s.what in OF_OURS_NOT)]
    return Case(name, dtype, (*steps, draw(CALLS)))


def seeded(test: Any) -> Any:
    return test if SEED is None else seed(int(SEED))(test)


# What once differed.
FOUND = {
    "bounds of a ReLU6": Case(steps=(Do("any setting", "3.bn1.act", 1), Call())),
    "another pool": Case("torchvision", steps=(Do("another child", "features.1.0.block.1.avgpool", 5), Call())),
    "a larger pool": Case("torchvision", steps=(Do("any setting", "features.1.0.block.1.avgpool"), Call())),
    "padded 1x1": Case(steps=(Do("padding mode", "1.conv_pwl", 1), Call())),
    "padded squeeze": Case(steps=(Do("padding mode", "1.se.conv_reduce", 1), Call())),
    "epsilon of NumPy": Case(steps=(Do("eps", "2.bn1", 3), Call(times=4), Do("eps", "2.bn1", 4), Call())),
    "epsilon in a tensor": Case(
        steps=(Do("eps", "2.bn1", 5), Call(times=4), Do("setting changed in place", "2.bn1"), Call())
    ),
    "stride in a Size": Case(steps=(Do("stride", "2.conv_dw", 6), Call(times=4), Do("stride", "2.conv_dw", 5), Call())),
    "statistics that want gradients": Case(steps=(Do("buffers that want gradients", "1.bn1"), Call(mode="grad"))),
    "input of inference mode": Case("test_efficientnet", steps=(Call(mode="grad", layout="of inference mode"),)),
    "nested input": Case("test_efficientnet", steps=(Call(times=3), Call(layout="nested"))),
    "compiled child": Case(steps=(Do("compiled by itself", "1.bn1"), Call())),
    "compiled stage": Case(
        "test_efficientnet", steps=(Call(times=4), Do("compiled by itself", "blocks.1"), Call(times=3))
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_once_differed(one_process: None, name: str) -> None:
    torch._dynamo.reset()
    check(FOUND[name])


@pytest.mark.exhaustive
def test_compiled_as_a_whole(one_process: None) -> None:
    torch._dynamo.reset()
    check(Case(steps=(Do("compiled"), Call(False), Call(True, "grad"))))


@seeded
@settings(max_examples=EXAMPLES, derandomize=SEED is None, database=None)
@given(cases())
def test_patched_equals_stock(one_process: None, case: Case) -> None:
    check(case)
