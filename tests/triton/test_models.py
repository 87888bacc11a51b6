"""Whole patched models on the Triton kernels."""

import pytest

from tests import whole_models


@whole_models.each_model
@pytest.mark.usefixtures("poison")
def test_models(name, dtype):
    assert whole_models.agrees(name, "triton", dtype)
