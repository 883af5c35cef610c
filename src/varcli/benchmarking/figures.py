"""What the rounds say: what a picture costs, in all and stage by stage. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from varcli.benchmarking.contestants import Contestant
    from varcli.benchmarking.rounds import Contest, Round

PHASES = ("transformer", "drawing", "decoder", "PNG")
"""In the order of the work. PNGs are encoded after the pixels are there, so that they are in no sum."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the work on a picture."""

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
        """Return what to call it in a table."""
        return f"{self.phase} {self.step}".rstrip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What one way to make a picture costs."""

    sampler: str
    precision: str
    batch_size: int
    seconds_per_picture: float
    """Median over the rounds, from the first number to the last pixel; no PNG yet."""
    pictures_per_second: float
    """Of batches with nothing else under way: the inverse of that. One after the other they overlap, and give more."""
    latency: Mapping[str, float]
    """Seconds until a batch is there: p50, p90 and p99 over the rounds."""
    times_varcli: float
    """Seconds a picture, as a multiple of varcli's."""
    operations: int
    """Floating-point operations a picture."""
    matmul_rate: float
    """Floating-point operations a second of plain matrix products in this precision, measured in every round."""
    matmul_fraction: float
    """Operations a second, as a fraction of that."""
    recorded: bool
    """Whether its steps were played as CUDA graphs."""
    stages: Sequence[Stage]
    """For one picture. Each time is a median of its own, so that they add up to the whole only about."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which this many percent lie, between two values in proportion."""
    rising, place = sorted(values), (len(values) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(rising) - 1)
    return rising[below] + (place - below) * (rising[above] - rising[below])


def figures(contestants: Sequence["Contestant"], contest: "Contest") -> list[Figures]:
    """Return what each contestant costs; the first one is varcli's own sampler."""
    found: list[Figures] = []
    for contestant, rounds, rate in zip(contestants, contest.rounds, contest.matmul_rates, strict=True):
        latencies = [turn.seconds for turn in rounds]
        seconds, operations = median(latencies) / contestant.batch, sum(contestant.operations.values())
        found.append(
            Figures(
                sampler=contestant.name,
                precision=contestant.precision,
                batch_size=contestant.batch,
                seconds_per_picture=seconds,
                pictures_per_second=1 / seconds,
                latency={f"p{percent}": percentile(latencies, percent) for percent in (50, 90, 99)},
                times_varcli=seconds / found[0].seconds_per_picture if found else 1.0,
                operations=operations,
                matmul_rate=rate,
                matmul_fraction=operations / seconds / rate,
                recorded=contestant.recorded(),
                stages=_stages(contestant, rounds, rate),
            )
        )
    return found


def _stages(contestant: "Contestant", rounds: Sequence["Round"], rate: float) -> list[Stage]:
    """Return the parts of the work on a picture, in the order of the phases."""
    parts = [_parts(contestant, turn) for turn in rounds]
    found = []
    for phase, step in sorted(parts[0], key=lambda part: PHASES.index(part[0])):
        seconds = median(each[phase, step] for each in parts)
        operations = contestant.operations.get((phase, step))
        fraction = None if operations is None else operations / seconds / rate
        found.append(Stage(phase, step, seconds, operations, fraction))
    return found


def _parts(contestant: "Contestant", turn: "Round") -> Mapping[tuple[str, str], float]:
    """Return the seconds a picture of each phase and, of the transformer's, each step."""
    seconds: dict[tuple[str, str], float] = {("PNG", ""): turn.encoding / contestant.batch}
    for lap in turn.laps:
        part = (lap.phase, contestant.steps[lap.number] if lap.phase == "transformer" else "")
        seconds[part] = seconds.get(part, 0) + lap.seconds / contestant.batch
    return seconds
