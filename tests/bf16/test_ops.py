"""The tests of the ops on the builds that multiply bfloat16, with the instructions that the processor lacks emulated.

They run in a process of their own: a process has one CPU library, and here it is the emulated one.
"""

import os
import subprocess
import sys

import pytest

from tests.bf16 import build
from tests.processor import LACKING

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable())),
]

FILES = (
    "test_pointwise_conv_bn_act.py",
    "test_fused_mbconv.py",
    "test_mbconv.py",
    "test_special_values.py",
    "test_determinism.py",
    "test_weight_changes.py",
)


@pytest.mark.parametrize("isa", LACKING)
def test_ops(isa):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.bf16.emulated",
    ]
    files = [f"tests/ops/{name}" for name in FILES]
    result = subprocess.run(
        [*command, *files, "-k", f"cpu-{isa} and bfloat16"],
        cwd=build.ROOT,
        env={**os.environ, "PYTHONPATH": str(build.ROOT), "EMULATED_SETS": " ".join(LACKING)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
