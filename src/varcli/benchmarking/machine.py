"""The machine: what it is, how fast it multiplies matrices when it has nothing else to do, how much memory was used.

Shapes: M rows of data, N rows of weights, K columns of both.
"""

import platform
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.sampling.devices import DTYPES, synchronize

CPU_SIZE, GPU_SIZE = 1024, 8192
"""Rows and columns of the matrices: enough to keep the machine busy, not long to wait for."""
WHILE = 0.05
"""Seconds for which each way to multiply is repeated; the fastest time counts."""


@torch.inference_mode()
def matmul_rate(device: torch.device, precision: str) -> float:
    """Return floating-point operations a second in this precision: the best of several products of large matrices."""
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    data_MK, weight_NK = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    return 2 * size**3 / min(_fastest(device, partial(way, data_MK, weight_NK)) for way in (F.linear, pointwise))


def pointwise(data_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Return the product (M, N) as a 1×1 convolution: on CPUs by another library, in float32 twice as fast."""
    image_1KM1 = data_MK[None, :, None].permute(0, 3, 1, 2)
    return F.conv2d(image_1KM1, weight_NK[:, :, None, None])[0, :, :, 0].T


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
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
