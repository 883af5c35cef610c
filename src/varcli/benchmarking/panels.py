"""A benchmark as a chart: where the time of an image goes, and how it compares. No torch here."""

from collections.abc import Sequence

from varcli.benchmarking.results import PHASES, SamplerTimings
from varcli.charts import Bars, digits


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
