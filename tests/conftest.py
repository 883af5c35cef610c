"""What several test files share."""

import pytest

import reference


@pytest.fixture(scope="session", params=["mini", "mini_shared"])
def original(request):
    """One of the two small models with the original implementation's outputs."""
    return reference.load(request.param)
