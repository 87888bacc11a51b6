"""The native kernels of training read and write nothing outside of their tensors, to the byte."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from tests.guarded import Copies, death, guarded
from tests.processor import NATIVE
from tests.thinning import daily
from tests.training.blocks import CASES, Case, build


def assert_within(case: Case, dtype: torch.dtype, at_end: bool) -> None:
    problem = build(case, dtype).to(dtype, torch.float32)
    expected = problem.run("cpu")
    with Copies(lambda t, _: guarded(t, at_end)) as copies:
        got = problem.run("cpu")
    assert copies.calls
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("isa", daily(NATIVE, NATIVE[-1:]))
def test_bounds(isa):
    # In a process of its own: one that has run backward cannot fork and run it again.
    environment = {**os.environ, "EFFNET_KERNELS_CPU_ISA": isa}
    command = [sys.executable, "-m", "tests.training.test_bounds"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


if __name__ == "__main__":
    every = itertools.product(CASES, (torch.float32, torch.bfloat16), (False, True))
    sys.exit(death((f"{job}", lambda job=job: assert_within(*job)) for job in every))
