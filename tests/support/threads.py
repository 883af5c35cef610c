"""How many threads torch computes with in a test's own process."""

from contextlib import contextmanager

import torch


@contextmanager
def one_thread():
    """Compute as a process with OMP_NUM_THREADS=1 does: more threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
