"""Fixtures shared by the tests of modules and patching."""

import pytest

from tests.models import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here, in turn."""
    return request.param
