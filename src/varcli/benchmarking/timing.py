"""Timing samplers in turns, and the machine: what it is, and how fast it multiplies matrices.

Shapes: N rows, I features of each.
"""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from varcli.acceleration.devices import DTYPES, out_of_memory, pick_dtype, synchronize
from varcli.acceleration.onednn import PackedLinear, packing_works
from varcli.benchmarking.samplers import BenchSampler
from varcli.errors import RunError
from varcli.images.provenance import png_bytes


class Stopwatch:
    """Starts when it is made; on CUDA it records events in the stream, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: list[str] = []
        synchronize(device)
        self._moments = [self._now()]

    def mark(self, phase: str) -> None:
        """Note that this phase ends now."""
        self.phases.append(phase)
        self._moments.append(self._now())

    def seconds(self) -> list[float]:
        """How long each phase took, in the order they ended."""
        synchronize(self.device)
        pairs = pairwise(self._moments)
        if self.device.type == "cuda":
            return [begin.elapsed_time(end) / 1000 for begin, end in pairs]
        return [end - begin for begin, end in pairs]

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True, slots=True)
class Lap:
    """One phase of the work on a batch."""

    phase: str
    number: int
    """How often the phase came before."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Round:
    """What one batch took."""

    laps: Sequence[Lap]
    """From the first number to the last pixel."""
    encoding: float
    """Seconds to encode it as PNGs afterwards."""

    @property
    def seconds(self) -> float:
        """Time from the first number to the last pixel."""
        return sum(lap.seconds for lap in self.laps)


def run_once(sampler: BenchSampler, device: torch.device, seed: int) -> Round:
    """Time one batch, whose seeds count up from `seed`.

    Raises:
        RunError: it does not fit into memory.
    """
    watch = Stopwatch(device)
    try:
        images = sampler.make(range(seed, seed + sampler.batch), watch.mark)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        what = f"{sampler.name} with {sampler.batch} images at a time does not fit into memory"
        raise RunError(f"{what}; use a smaller --batch-size or checkpoint") from error
    laps = [
        Lap(phase, watch.phases[:number].count(phase), seconds)
        for number, (phase, seconds) in enumerate(zip(watch.phases, watch.seconds(), strict=True))
    ]
    begin = time.perf_counter()
    for image in images:
        png_bytes(image)
    return Round(laps, time.perf_counter() - begin)


@dataclass(frozen=True, slots=True)
class InterleavedTimings:
    """What several samplers took, and how fast the machine was in between."""

    rounds: Sequence[Sequence[Round]]
    """Of each sampler."""
    matmul_rates: Sequence[float]
    """Operations per second of plain matrix products in its precision, the median of one measurement per round."""


def time_interleaved(
    samplers: Sequence[BenchSampler], device: torch.device, rounds: int, advance: Callable[[], None]
) -> InterleavedTimings:
    """Time the samplers in turns: in each round all sample a batch, one after the other, from the same seed."""
    taken: list[list[Round]] = [[] for _ in samplers]
    rates: dict[str, list[float]] = {sampler.precision: [] for sampler in samplers}
    for turn in range(rounds):
        for sampler, found in zip(samplers, taken, strict=True):
            found.append(run_once(sampler, device, seed=turn * sampler.batch))
            advance()
        for precision, measured in rates.items():
            measured.append(matmul_rate(device, precision))
    return InterleavedTimings(taken, [median(rates[sampler.precision]) for sampler in samplers])


def warm_up(sampler: BenchSampler, device: torch.device, advance: Callable[[], None]) -> None:
    """Sample the batches that are not counted: libraries are loaded, and CUDA graphs are captured."""
    for turn in range(warm_ups(device)):
        run_once(sampler, device, seed=turn)
        advance()


def warm_ups(device: torch.device) -> int:
    """How many batches a warm-up has."""
    return 3 if device.type == "cuda" else 1


CPU_SIZE, GPU_SIZE = 1024, 8192
"""Rows and columns of the matrices: enough to keep the machine busy, not long to wait for."""
REPEAT_SECONDS = 0.05
"""Seconds for which each kind of product is repeated; the fastest time counts."""


@torch.inference_mode()
def matmul_rate(device: torch.device, precision: str) -> float:
    """Return floating-point operations a second in this precision: the better of torch's products, plain and packed.

    For "int8" it is the rate of the precision that everything else has, such as the decoder.
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
    while sum(taken) < REPEAT_SECONDS or len(taken) == 1:  # the first one may load a library
        synchronize(device)
        begin = time.perf_counter()
        product()
        synchronize(device)
        taken.append(time.perf_counter() - begin)
    return min(taken)


def hardware(device: torch.device) -> str:
    """Name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"
