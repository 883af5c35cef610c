"""Devices: choice, precision, memory."""

import contextlib
import ctypes
import platform
import sys
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from varcli.acceleration.int8 import Int8Linear
from varcli.errors import UsageError
from varcli.files import machine_memory
from varcli.models.transformer import Block, Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by the names users type."""


def pick_device(name: str) -> torch.device:
    """Return the device of that name; for "auto" CUDA, else MPS, else the CPU.

    Raises:
        UsageError: torch knows no such device or this machine has none.
    """
    if name == "auto":
        present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(kind for kind, there in present.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:1 or mps (got {name})") from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts.get(device.type, 0):
        has = ", ".join(f"{kind}:{i}" if i else kind for kind, count in counts.items() for i in range(count))
        raise UsageError(f"this machine has no device {name}, only {has}")
    return device


def pick_dtype(name: str, device: torch.device) -> str:
    """Return the name of the precision; for "auto" 16 bits on CUDA and on CPUs made for them, fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        computes = torch.cuda.is_bf16_supported(including_emulation=False)  # older GPUs know fp16 alone
        return "bf16" if computes else "fp16"
    return "bf16" if device.type == "cpu" and cpu_computes_bf16() else "fp32"


def cpu_computes_bf16() -> bool:
    """Whether the CPU has instructions for bf16 (AVX512-BF16, AMX or Arm's) and torch uses them.

    On x86 oneDNN's own answer is of no use: it is yes where AVX-512 emulates bf16, which is slower than float32.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("arm64", "aarch64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def trains_in_bf16(device: torch.device) -> bool:
    """Whether training in bf16 is faster on a device: GPUs that compute in it, and CPUs with AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def precision_note(precision: str, device: torch.device) -> str | None:
    """Return a note where images depend on the batch, as "auto" chose 16 bits on a GPU; None elsewhere."""
    if device.type == "cpu" or precision == "fp32":
        return None
    return f"computing on {device} in {precision}, where images depend on the batch size; --dtype fp32 avoids it"


def check_int8(device: torch.device) -> None:
    """Raise UsageError unless a device multiplies int8, and torch lets it.

    Without VNNI instructions the CPU's sums of products would overflow.
    """
    vnni = device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
    if device.type != "cuda" and not vnni:
        raise UsageError(f"--quantize int8 needs CUDA or a CPU with VNNI, and {device} is neither: leave it out")


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU of any system."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    "out of memory",  # CUDA and Metal
    "ALLOC_FAILED",  # CUDA's libraries
    "Invalid buffer size",  # Metal, of a single tensor
    "can't allocate memory",  # the CPU's allocator on Linux and macOS
    "not enough memory",  # and on Windows
)


def free_memory(device: torch.device) -> None:
    """Empty torch's cache of free memory, which avoids fragmentation when batches get smaller."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def memory_bytes(device: torch.device) -> int | None:
    """Return the total memory of a device in bytes, None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return machine_memory()


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak memory of the process in bytes: on CUDA the GPU's, else its own; None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def independent(transformer: Transformer) -> bool:
    """Whether images must be computed one by one to come out the same in any batch.

    In float32 that is promised, and on a CPU it costs nothing. On a GPU in 16 bits batches make it fast, and the batch
    size changes the rounding.
    """
    weight = block_weight(transformer)
    return weight.device.type == "cpu" or weight.dtype == torch.float32


@cache
def keep_freed_memory() -> None:
    """Make glibc, if it is the C library, keep large freed blocks instead of returning them to the system.

    The same sizes are allocated again and again, and each page from the system costs a page fault and zeroing.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError):  # other C libraries have no such setting
        settings = ctypes.CDLL(None).mallopt
        # Before 2.35 it accepts at most 32 MiB; where it accepts neither, its own dynamic thresholds are best.
        if settings(_MMAP_THRESHOLD, 2**30) or settings(_MMAP_THRESHOLD, 2**25):
            settings(_TRIM_THRESHOLD, 2**31 - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""From malloc.h."""


def block_weight(transformer: Transformer) -> Tensor:
    """Return a weight of the device and precision in which the blocks compute."""
    projection: Any = cast("Block", transformer.blocks[0]).attn.proj
    return projection.bias if isinstance(projection, Int8Linear) else projection.weight
