"""One benchmark from beginning to end: models, samplers, rounds, figures, chart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from varcli.acceleration.devices import peak_bytes
from varcli.acceleration.dispatch import prepare
from varcli.benchmarking.samplers import Models, naive_sampler, raster_scan, varcli
from varcli.benchmarking.timing import hardware, take_turns, warm_up, warm_ups
from varcli.charts import Bars, digits
from varcli.config import SampleConfig

if TYPE_CHECKING:
    from varcli.benchmarking.samplers import BenchSampler
    from varcli.benchmarking.timing import Contest, Round


PHASES = ("transformer", "drawing", "decoder", "PNG")
"""In the order of the work. PNGs are encoded after the pixels are there, so that they are in no sum."""


@dataclass(frozen=True, slots=True)
class StageTiming:
    """A part of the work on an image."""

    phase: str
    """One of `PHASES`."""
    step: str
    """Of the transformer: which scale, or how many tokens; else empty."""
    seconds: float
    operations: int | None
    """Floating-point; None where they are too few to count."""
    matmul_fraction: float | None
    """Operations a second, as a fraction of the matmul rate."""

    @property
    def name(self) -> str:
        """What to call it in a table."""
        return f"{self.phase} {self.step}".rstrip()


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerTimings:
    """What one way to make an image costs."""

    sampler: str
    precision: str
    batch_size: int
    seconds_per_image: float
    """Median over the rounds, from the first number to the last pixel; no PNG yet."""
    images_per_second: float
    """Of batches with nothing else under way: the inverse of that. One after the other they overlap, and give more."""
    latency: Mapping[str, float]
    """Seconds until a batch is there: p50, p90 and p99 over the rounds."""
    times_varcli: float
    """Seconds an image, as a multiple of varcli's."""
    operations: int
    """Floating-point operations an image."""
    matmul_rate: float
    """Floating-point operations a second of plain matrix products in this precision, measured in every round."""
    matmul_fraction: float
    """Operations a second, as a fraction of that."""
    cuda_graphs: bool
    """Whether its steps were replayed as CUDA graphs."""
    stages: Sequence[StageTiming]
    """For one image. Each time is a median of its own, so that they add up to the whole only about."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which this many percent lie, between two values in proportion."""
    rising, place = sorted(values), (len(values) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(rising) - 1)
    return rising[below] + (place - below) * (rising[above] - rising[below])


def sampler_timings(contestants: Sequence["BenchSampler"], contest: "Contest") -> list[SamplerTimings]:
    """What each contestant costs; the first one is varcli's own sampler."""
    found: list[SamplerTimings] = []
    for contestant, rounds, rate in zip(contestants, contest.rounds, contest.matmul_rates, strict=True):
        latencies = [turn.seconds for turn in rounds]
        seconds, operations = median(latencies) / contestant.batch, sum(contestant.operations.values())
        found.append(
            SamplerTimings(
                sampler=contestant.name,
                precision=contestant.precision,
                batch_size=contestant.batch,
                seconds_per_image=seconds,
                images_per_second=1 / seconds,
                latency={f"p{percent}": percentile(latencies, percent) for percent in (50, 90, 99)},
                times_varcli=seconds / found[0].seconds_per_image if found else 1.0,
                operations=operations,
                matmul_rate=rate,
                matmul_fraction=operations / seconds / rate,
                cuda_graphs=contestant.cuda_graphs(),
                stages=_stage_timings(contestant, rounds, rate),
            )
        )
    return found


def _stage_timings(contestant: "BenchSampler", rounds: Sequence["Round"], rate: float) -> list[StageTiming]:
    """Return the parts of the work on an image, in the order of the phases."""
    parts = [_parts(contestant, turn) for turn in rounds]
    found = []
    for phase, step in sorted(parts[0], key=lambda part: PHASES.index(part[0])):
        seconds = median(each[phase, step] for each in parts)
        operations = contestant.operations.get((phase, step))
        fraction = None if operations is None else operations / seconds / rate
        found.append(StageTiming(phase, step, seconds, operations, fraction))
    return found


def _parts(contestant: "BenchSampler", turn: "Round") -> Mapping[tuple[str, str], float]:
    """Return the seconds an image of each phase and, of the transformer's, each step."""
    seconds: dict[tuple[str, str], float] = {("PNG", ""): turn.encoding / contestant.batch}
    for lap in turn.laps:
        part = (lap.phase, contestant.steps[lap.number] if lap.phase == "transformer" else "")
        seconds[part] = seconds.get(part, 0) + lap.seconds / contestant.batch
    return seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """What was found."""

    hardware: str
    peak_bytes: int | None
    """Memory at most while varcli's own sampler ran: the GPU's on CUDA, else the process's; None where not told."""
    samplers: Sequence[SamplerTimings]
    """varcli's own first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchPlan:
    """What to benchmark, and how."""

    load: Callable[[], Models]
    """Gives the models anew each time, on the CPU."""
    config: SampleConfig
    device: torch.device
    precision: str
    batch: int
    """Images at a time, where several are made at a time."""
    others: Sequence[str]
    """What to compare with: "naive", "raster"."""
    rounds: int

    @property
    def batches(self) -> int:
        """How many there will be, the uncounted ones included."""
        return (1 + len(self.others)) * (warm_ups(self.device) + self.rounds)


def run_benchmark(
    plan: BenchPlan, advance: Callable[[], None], note: Callable[[str], None] = lambda line: None
) -> Benchmark:
    """What an image costs.

    Args:
        plan: what to run_benchmark.
        advance: called after each batch.
        note: told, in a line, what makes this slower than it might be.

    Raises:
        RunError: memory does not suffice.
    """
    models = plan.load()
    prepare(*models, plan.device, plan.precision)
    contestants = [varcli(models, plan.config, plan.precision, plan.batch, note)]
    warm_up(contestants[0], plan.device, advance)
    most = peak_bytes(plan.device)
    for other in plan.others:
        if other == "naive":
            contestants.append(naive_sampler(as_loaded(plan), plan.config))
        else:
            contestants.append(raster_scan(models, plan.config, plan.precision, plan.batch, note))
        warm_up(contestants[-1], plan.device, advance)
    contest = take_turns(contestants, plan.device, plan.rounds, advance)
    return Benchmark(hardware=hardware(plan.device), peak_bytes=most, samplers=sampler_timings(contestants, contest))


def as_loaded(plan: BenchPlan) -> Models:
    """Return the models once more, on the device and otherwise untouched."""
    tokenizer, transformer = plan.load()
    return tokenizer.to(plan.device), transformer.to(plan.device)


# --- the chart -------------------------------------------------------------------------------------


def panels(title: str, samplers: Sequence[SamplerTimings]) -> list[Bars]:
    """Return one panel of the first sampler's stages and, where there are others, one of all samplers."""
    found = [_stages(title, samplers[0])]
    return found if len(samplers) == 1 else [*found, _totals(samplers)]


def _stages(title: str, sampler: SamplerTimings) -> Bars:
    """Return a bar a stage, coloured by its phase."""
    parts = {
        phase: [1000 * stage.seconds if stage.phase == phase else 0 for stage in sampler.stages] for phase in PHASES
    }
    labels = [stage.step or stage.phase for stage in sampler.stages]
    return Bars(title=title, unit="milliseconds an image", labels=labels, parts=parts)


def _totals(samplers: Sequence[SamplerTimings]) -> Bars:
    """Return a bar a sampler."""
    parts = {
        phase: [sum(stage.seconds for stage in each.stages if stage.phase == phase) for each in samplers]
        for phase in PHASES[:-1]  # as `seconds_per_image` is without the PNG
    }
    notes = [f"{digits(each.seconds_per_image)} s, {digits(each.times_varcli)} ×" for each in samplers]
    labels = [f"{each.sampler}, {each.precision}" for each in samplers]
    return Bars(title="In comparison", unit="seconds an image", labels=labels, parts=parts, notes=notes)
