"""Rounds in which all contestants take turns, so that a machine that is busy for a while is so for each of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from varcli.benchmarking.contestants import Contestant
from varcli.benchmarking.machine import matmul_rate
from varcli.benchmarking.stopwatch import Stopwatch
from varcli.data.images import png_bytes
from varcli.errors import RunError
from varcli.sampling.devices import out_of_memory


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
    """Seconds of making PNGs of it afterwards."""

    @property
    def seconds(self) -> float:
        """Return the time from the first number to the last pixel."""
        return sum(lap.seconds for lap in self.laps)


def run_once(contestant: Contestant, device: torch.device, seed: int) -> Round:
    """Return what a batch takes whose seeds count up from `seed`.

    Raises:
        RunError: it does not fit into memory.
    """
    watch = Stopwatch(device)
    try:
        pictures = contestant.make(range(seed, seed + contestant.batch), watch.mark)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        what = f"{contestant.name} with {contestant.batch} pictures at a time does not fit"
        raise RunError(f"memory: {what}; fewer with --batch-size, or a smaller checkpoint") from error
    laps = [
        Lap(phase, watch.phases[:number].count(phase), seconds)
        for number, (phase, seconds) in enumerate(zip(watch.phases, watch.seconds(), strict=True))
    ]
    begin = time.perf_counter()
    for picture in pictures:
        png_bytes(picture)
    return Round(laps, time.perf_counter() - begin)


@dataclass(frozen=True, slots=True)
class Contest:
    """What several contestants took, and what the machine did in between."""

    rounds: Sequence[Sequence[Round]]
    """Of each contestant."""
    matmul_rates: Sequence[float]
    """Operations a second of plain matrix products in its precision, the median of one measurement a round."""


def take_turns(
    contestants: Sequence[Contestant], device: torch.device, rounds: int, advance: Callable[[], None]
) -> Contest:
    """Return what everybody took: in each round all make a batch, one after the other, from the same seed on."""
    taken: list[list[Round]] = [[] for _ in contestants]
    rates: dict[str, list[float]] = {contestant.precision: [] for contestant in contestants}
    for turn in range(rounds):
        for contestant, found in zip(contestants, taken, strict=True):
            found.append(run_once(contestant, device, seed=turn * contestant.batch))
            advance()
        for precision, measured in rates.items():
            measured.append(matmul_rate(device, precision))
    return Contest(taken, [median(rates[contestant.precision]) for contestant in contestants])


def warm_up(contestant: Contestant, device: torch.device, advance: Callable[[], None]) -> None:
    """Make the batches that nobody counts: libraries are loaded, and a GPU's graphs are recorded."""
    for turn in range(warm_ups(device)):
        run_once(contestant, device, seed=turn)
        advance()


def warm_ups(device: torch.device) -> int:
    """Return how many batches those are."""
    return 3 if device.type == "cuda" else 1
