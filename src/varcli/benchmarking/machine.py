"""The machine: what it is, how fast it multiplies matrices when it has nothing else to do, how much memory was used.

Shapes: N rows, I features of each.
"""

import platform
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from varcli.models.packed import PackedLinear, packing_works
from varcli.sampling.devices import DTYPES, pick_dtype, synchronize

CPU_SIZE, GPU_SIZE = 1024, 8192
"""Rows and columns of the matrices: enough to keep the machine busy, not long to wait for."""
WHILE = 0.05
"""Seconds for which each way to multiply is repeated; the fastest time counts."""


@torch.inference_mode()
def matmul_rate(device: torch.device, precision: str) -> float:
    """Return floating-point operations a second in this precision: the better of torch's products, plain and packed.

    For "int8" those of the precision that everything else is in, the decoder for one.
    """
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    dtype = DTYPES[pick_dtype("auto", device) if precision == "int8" else precision]
    data_NI = torch.randn(size, size, device=device).to(dtype)
    linear = nn.Linear(size, size, bias=False, device=device, dtype=dtype)
    ways: list[nn.Module] = [linear]
    if device.type == "cpu" and packing_works(dtype):
        ways.append(PackedLinear(linear))
    return 2 * size**3 / min(_fastest(device, partial(way, data_NI)) for way in ways)


def _fastest(device: torch.device, product: Callable[[], Tensor]) -> float:
    """Return the seconds of the fastest of several runs."""
    taken: list[float] = []
    while sum(taken) < WHILE or len(taken) == 1:  # the first one may load a library
        synchronize(device)
        begin = time.perf_counter()
        product()
        synchronize(device)
        taken.append(time.perf_counter() - begin)
    return min(taken)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory the process has used so far: on CUDA the GPU's, else its own; None where not told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # noqa: PLC0415 - Windows has none
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def hardware(device: torch.device) -> str:
    """Return what computes, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"
