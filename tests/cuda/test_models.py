"""Whole patched models on the CUDA kernels."""

import pytest

from effnet_kernels.dispatch import backends
from tests import whole_models


@pytest.mark.parametrize(("model", "dtype"), whole_models.CASES)
@pytest.mark.usefixtures("poison")
def test_models(model, dtype):
    assert whole_models.agrees(model(), "cuda", dtype)


@pytest.mark.parametrize(("model", "dtype"), [case for case in whole_models.CASES if case.values[1].itemsize == 2])
@pytest.mark.usefixtures("poison")
def test_models_of_two_backends(model, dtype):
    available, reason = backends()["mixed"]
    if not available:
        pytest.skip(reason)
    assert whole_models.agrees(model(), "mixed", dtype)
