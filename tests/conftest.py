"""Fixtures shared by the tests of modules and patching; Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

# Triton reads it when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.models import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here, in turn."""
    return request.param
