"""Whole patched models on the CUDA kernels."""

import pytest

from effnet_kernels.dispatch import backends
from tests import whole_models
from tests.thinning import daily


@whole_models.each_model
@pytest.mark.usefixtures("poison")
def test_models(name, dtype):
    assert whole_models.agrees(name, "cuda", dtype)


@pytest.mark.parametrize(
    ("name", "dtype"), daily([case for case in whole_models.CASES if case[1].itemsize == 2], whole_models.EVERY_DAY)
)
@pytest.mark.usefixtures("poison")
def test_models_of_two_backends(name, dtype):
    available, reason = backends()["mixed"]  # known once the kernels are registered
    if not available:
        pytest.skip(reason)
    assert whole_models.agrees(name, "mixed", dtype)
