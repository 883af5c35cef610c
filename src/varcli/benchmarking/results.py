"""A benchmark from beginning to end: models, samplers, rounds, figures, chart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from varcli.acceleration.devices import peak_bytes
from varcli.acceleration.dispatch import prepare
from varcli.benchmarking.samplers import Models, naive_sampler, raster_scan, varcli
from varcli.benchmarking.timing import hardware, time_interleaved, warm_up, warm_ups
from varcli.charts import Bars, digits
from varcli.config import SampleConfig

if TYPE_CHECKING:
    from varcli.benchmarking.samplers import BenchSampler
    from varcli.benchmarking.timing import InterleavedTimings, Round


PHASES = ("transformer", "token sampling", "decoder", "PNG")
"""In the order of the work. PNGs are encoded after the last pixel, so no sum includes them."""


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
    """Operations per second, as a fraction of the matmul rate."""

    @property
    def name(self) -> str:
        """What to call it in a table."""
        return f"{self.phase} {self.step}".rstrip()


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerTimings:
    """What a sampler costs."""

    sampler: str
    precision: str
    batch_size: int
    seconds_per_image: float
    """Median over the rounds, from the first number to the last pixel; no PNG yet."""
    images_per_second: float
    """The inverse of that: of batches one at a time. Batches in a row overlap, and give more."""
    latency: Mapping[str, float]
    """Seconds until a batch is there: p50, p90 and p99 over the rounds."""
    times_varcli: float
    """Seconds per image, as a multiple of varcli's."""
    operations: int
    """Floating-point operations per image."""
    matmul_rate: float
    """Floating-point operations per second of plain matrix products in this precision, measured in every round."""
    matmul_fraction: float
    """Operations per second, as a fraction of that."""
    cuda_graphs: bool
    """Whether its steps were replayed as CUDA graphs."""
    stages: Sequence[StageTiming]
    """For one image. Each time is a median of its own, so that their sum is only about the whole."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly between two values."""
    rising, place = sorted(values), (len(values) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(rising) - 1)
    return rising[below] + (place - below) * (rising[above] - rising[below])


def sampler_timings(samplers: Sequence["BenchSampler"], timed: "InterleavedTimings") -> list[SamplerTimings]:
    """What each sampler costs; the first one is varcli's own."""
    found: list[SamplerTimings] = []
    for sampler, rounds, rate in zip(samplers, timed.rounds, timed.matmul_rates, strict=True):
        latencies = [turn.seconds for turn in rounds]
        seconds, operations = median(latencies) / sampler.batch, sum(sampler.operations.values())
        found.append(
            SamplerTimings(
                sampler=sampler.name,
                precision=sampler.precision,
                batch_size=sampler.batch,
                seconds_per_image=seconds,
                images_per_second=1 / seconds,
                latency={f"p{percent}": percentile(latencies, percent) for percent in (50, 90, 99)},
                times_varcli=seconds / found[0].seconds_per_image if found else 1.0,
                operations=operations,
                matmul_rate=rate,
                matmul_fraction=operations / seconds / rate,
                cuda_graphs=sampler.cuda_graphs(),
                stages=_stage_timings(sampler, rounds, rate),
            )
        )
    return found


def _stage_timings(sampler: "BenchSampler", rounds: Sequence["Round"], rate: float) -> list[StageTiming]:
    """Return the parts of the work on an image, in the order of the phases."""
    parts = [_parts(sampler, turn) for turn in rounds]
    found = []
    for phase, step in sorted(parts[0], key=lambda part: PHASES.index(part[0])):
        seconds = median(each[phase, step] for each in parts)
        operations = sampler.operations.get((phase, step))
        fraction = None if operations is None else operations / seconds / rate
        found.append(StageTiming(phase, step, seconds, operations, fraction))
    return found


def _parts(sampler: "BenchSampler", turn: "Round") -> Mapping[tuple[str, str], float]:
    """Return the seconds per image of each phase and, of the transformer's, each step."""
    seconds: dict[tuple[str, str], float] = {("PNG", ""): turn.encoding / sampler.batch}
    for lap in turn.laps:
        part = (lap.phase, sampler.steps[lap.number] if lap.phase == "transformer" else "")
        seconds[part] = seconds.get(part, 0) + lap.seconds / sampler.batch
    return seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Results of a benchmark."""

    hardware: str
    peak_bytes: int | None
    """Peak memory while varcli's own sampler ran: the GPU's on CUDA, else the process's; None where unknown."""
    samplers: Sequence[SamplerTimings]
    """varcli's own first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchPlan:
    """What to benchmark, and how."""

    load: Callable[[], Models]
    """Loads the models anew each time, on the CPU."""
    config: SampleConfig
    device: torch.device
    precision: str
    batch: int
    """Images at a time, where several are sampled at a time."""
    others: Sequence[str]
    """What to compare with: "naive", "raster"."""
    rounds: int

    @property
    def batches(self) -> int:
        """Number of batches, those of the warm-up included."""
        return (1 + len(self.others)) * (warm_ups(self.device) + self.rounds)


def run_benchmark(
    plan: BenchPlan, advance: Callable[[], None], note: Callable[[str], None] = lambda line: None
) -> Benchmark:
    """Measure what an image costs.

    Args:
        plan: what to benchmark.
        advance: called after each batch.
        note: takes a line about what makes this slower than it might be.

    Raises:
        RunError: memory does not suffice.
    """
    models = plan.load()
    prepare(*models, plan.device, plan.precision)
    samplers = [varcli(models, plan.config, plan.precision, plan.batch, note)]
    warm_up(samplers[0], plan.device, advance)
    most = peak_bytes(plan.device)
    for other in plan.others:
        if other == "naive":
            samplers.append(naive_sampler(as_loaded(plan), plan.config))
        else:
            samplers.append(raster_scan(models, plan.config, plan.precision, plan.batch, note))
        warm_up(samplers[-1], plan.device, advance)
    timed = time_interleaved(samplers, plan.device, plan.rounds, advance)
    return Benchmark(hardware=hardware(plan.device), peak_bytes=most, samplers=sampler_timings(samplers, timed))


def as_loaded(plan: BenchPlan) -> Models:
    """Return the models once more, on the device and otherwise unchanged."""
    tokenizer, transformer = plan.load()
    return tokenizer.to(plan.device), transformer.to(plan.device)


# --- the chart -------------------------------------------------------------------------------------


def panels(title: str, samplers: Sequence[SamplerTimings]) -> list[Bars]:
    """Return one panel of the first sampler's stages and, where there are others, one of all samplers."""
    found = [_stages(title, samplers[0])]
    return found if len(samplers) == 1 else [*found, _totals(samplers)]


def _stages(title: str, sampler: SamplerTimings) -> Bars:
    """Return one bar per stage, coloured by its phase."""
    parts = {
        phase: [1000 * stage.seconds if stage.phase == phase else 0 for stage in sampler.stages] for phase in PHASES
    }
    labels = [stage.step or stage.phase for stage in sampler.stages]
    return Bars(title=title, unit="milliseconds per image", labels=labels, parts=parts)


def _totals(samplers: Sequence[SamplerTimings]) -> Bars:
    """Return one bar per sampler."""
    parts = {
        phase: [sum(stage.seconds for stage in each.stages if stage.phase == phase) for each in samplers]
        for phase in PHASES[:-1]  # as `seconds_per_image` is without the PNG
    }
    notes = [f"{digits(each.seconds_per_image)} s, {digits(each.times_varcli)} ×" for each in samplers]
    labels = [f"{each.sampler}, {each.precision}" for each in samplers]
    return Bars(title="In comparison", unit="seconds per image", labels=labels, parts=parts, notes=notes)
