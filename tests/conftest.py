"""What several test files share."""

import os
import signal

# One thread each, also in what tests launch: several workers with as many threads as cores wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from support import reference

# Who is started in a shell's background is deaf to Ctrl-C, and so are the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session", params=["mini", "mini_shared"])
def original(request):
    """One of the two small models with the original implementation's outputs."""
    return reference.load(request.param)
