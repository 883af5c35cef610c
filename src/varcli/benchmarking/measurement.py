"""One benchmark from beginning to end: models, contestants, rounds, figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from varcli.benchmarking.contestants import Models, plain_twin, raster_scan, varcli
from varcli.benchmarking.figures import Figures, figures
from varcli.benchmarking.machine import hardware, peak_bytes
from varcli.benchmarking.rounds import take_turns, warm_up, warm_ups
from varcli.config import SampleConfig
from varcli.sampling.devices import place


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """What was found."""

    hardware: str
    peak_bytes: int | None
    """Memory at most while varcli's own sampler ran: the GPU's on CUDA, else the process's; None where not told."""
    samplers: Sequence[Figures]
    """varcli's own first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to measure, and how."""

    load: Callable[[], Models]
    """Gives the models anew each time, on the CPU."""
    config: SampleConfig
    device: torch.device
    precision: str
    batch: int
    """Pictures at a time, where several are made at a time."""
    others: Sequence[str]
    """What to compare with: "plain", "raster"."""
    rounds: int

    @property
    def batches(self) -> int:
        """How many there will be, the uncounted ones included."""
        return (1 + len(self.others)) * (warm_ups(self.device) + self.rounds)


def measure(plan: Plan, advance: Callable[[], None], note: Callable[[str], None] = lambda line: None) -> Benchmark:
    """Return what a picture costs.

    Args:
        plan: what to measure.
        advance: called after each batch.
        note: told, in a line, what makes this slower than it might be.

    Raises:
        RunError: memory does not suffice.
    """
    models = plan.load()
    place(*models, plan.device, plan.precision)
    contestants = [varcli(models, plan.config, plan.precision, plan.batch, note)]
    warm_up(contestants[0], plan.device, advance)
    most = peak_bytes(plan.device)
    for other in plan.others:
        if other == "plain":
            contestants.append(plain_twin(as_loaded(plan), plan.config))
        else:
            contestants.append(raster_scan(models, plan.config, plan.precision, plan.batch, note))
        warm_up(contestants[-1], plan.device, advance)
    contest = take_turns(contestants, plan.device, plan.rounds, advance)
    return Benchmark(hardware=hardware(plan.device), peak_bytes=most, samplers=figures(contestants, contest))


def as_loaded(plan: Plan) -> Models:
    """Return the models once more, on the device and otherwise untouched."""
    tokenizer, transformer = plan.load()
    return tokenizer.to(plan.device), transformer.to(plan.device)
