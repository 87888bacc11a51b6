"""Whole patched models on the Triton kernels."""

import pytest

from tests import whole_models


@pytest.mark.parametrize(("model", "dtype"), whole_models.CASES)
@pytest.mark.usefixtures("poison")
def test_models(model, dtype):
    assert whole_models.agrees(model(), "triton", dtype)
