"""The tests of the ops on the builds for AVX-512 and beyond, with the instructions that the processor lacks emulated.

They run in a process of their own: a process has one CPU library, and here it is the emulated one.
"""

import os
import subprocess
import sys

import pytest

from tests.bf16 import build
from tests.processor import LACKING

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


def cases(isa: str) -> str:
    """Of the builds that multiply bfloat16, that: with the rest they do as the one for AVX-512."""
    # That test goes on with another instruction set, and none is in the library.
    return "cpu-avx512 and not test_another_instruction_set" if isa == "avx512" else f"cpu-{isa} and bfloat16"


@pytest.mark.parametrize("isa", LACKING)
@pytest.mark.parametrize(
    "tests",
    [
        ["tests/ops/test_numbers.py::test_grid"],
        pytest.param(["tests/ops", "--exhaustive"], marks=pytest.mark.exhaustive),
    ],
    ids=["grid", "everything"],
)
def test_ops(tests, isa):
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-p", "tests.bf16.emulated", *tests, "-k", cases(isa)],
        cwd=build.ROOT,
        env={**os.environ, "PYTHONPATH": str(build.ROOT), "EMULATED_SET": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
