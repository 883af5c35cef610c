"""Charts as geometry: where bars, curves and ticks lie, in per cent of the space the page gives them.

The template draws them as SVG that stretches with the page while its text and its lines' widths stay as
they are; colours are the page's, so that they follow light, dark and paper.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from varcli.report.formatting import decimals, rounded

Point = tuple[float, float]
TICKS = 5
"""About so many on an axis."""
FEW = 40
"""So many points of a curve are shown one by one."""
HUES = 12
"""Looks of lines: six colours, then the same dashed; after these they come again."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale between round numbers."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    """Places in per cent, and what to write there."""

    def place(self, value: float) -> float:
        """Return where a value lies, from 0 to 100."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


@dataclass(frozen=True, slots=True)
class Line:
    """One curve or cloud of points of a chart."""

    label: str
    path: str
    """Of the curve, in SVG's language, on a field of 100 by 100."""
    dots: str
    """Of the points, each a stroke without length."""
    kind: str
    """What it looks like: "thin", "thick", or "open", which is rings."""
    hue: int
    strength: float = 1
    """From 0, invisible, to 1."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over a common field."""

    title: str
    x_title: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    summary: str
    """The chart in words, for who cannot see it."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, with what it is to be compared with."""

    label: str
    text: str
    length: float
    limit: float | None
    """Where FID∞ lies."""
    published: float | None
    published_text: str
    band: Point | None
    """Beginning and width of the band of reproductions."""


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars of one figure, on one scale."""

    title: str
    bars: tuple[Bar, ...]

    @property
    def has_published(self) -> bool:
        """Whether the paper has a figure for any of them."""
        return any(bar.published is not None for bar in self.bars)

    @property
    def has_limit(self) -> bool:
        """Whether FID∞ is known of any of them."""
        return any(bar.limit is not None for bar in self.bars)

    @property
    def summary(self) -> str:
        """The chart in words."""
        return f"{self.title}: " + "; ".join(
            f"{bar.label} {bar.text} {bar.published_text}".strip() for bar in self.bars
        )


def axis(values: Iterable[float]) -> Axis:
    """Return an axis that begins and ends at round numbers around values."""
    low, high = _extent(values)
    step = _round_step((high - low) / TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return _ticked(first * step, last * step, step)


def count_axis(values: Iterable[float]) -> Axis:
    """Return an axis of whole numbers that begins and ends with the values."""
    low, high = _extent(values)
    return _ticked(low, high, max(1, _round_step((high - low) / TICKS)))


def _ticked(low: float, high: float, step: float) -> Axis:
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ticks = ((100 * (n * step - low) / (high - low), rounded(n * step, step)) for n in numbers)
    return Axis(low, high, tuple((round(place, 2), text) for place, text in ticks))


def _extent(values: Iterable[float]) -> Point:
    found = list(values)
    low, high = min(found), max(found)
    slack = 0 if high - low > 1e-9 * max(1, abs(high)) else max(0.01, abs(high) / 10)
    return low - slack, high + slack


def _round_step(step: float) -> float:
    """Return the next of 1, 2, 5, 10, 20 … times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


@dataclass(frozen=True, slots=True)
class Curve:
    """Points that become a line of a chart."""

    label: str
    points: Sequence[Point]
    kind: str = "thick"
    hue: int = 0
    strength: float = 1


def line(curve: Curve, across: Axis, up: Axis) -> Line:
    """Return a curve as a line of a chart; single points show where they are few, or all there is."""
    placed = [(across.place(x), round(100 - up.place(y), 2)) for x, y in curve.points]
    path = "" if curve.kind == "open" else "M" + "L".join(f"{x:g} {y:g}" for x, y in placed)
    shown = len(placed) == 1 or (curve.kind != "thin" and len(placed) <= FEW)
    dots = "".join(f"M{x:g} {y:g}h.01" for x, y in placed) if shown else ""
    return Line(curve.label, path, dots, curve.kind, curve.hue, round(curve.strength, 2))


def settled(points: Sequence[Point], skip: float) -> list[float]:
    """Return the values that decide a curve's scale: those after `skip`, a part of its extent, where it is long."""
    begin = skip * points[-1][0] if len(points) > FEW else -math.inf
    return [y for x, y in points if x >= begin]


def curves(title: str, x_title: str, given: Sequence[Curve], begin: float, skip: float = 0) -> Chart:
    """Return a chart of curves, none of them empty, whose horizontal axis begins at `begin`.

    Of long curves the first part, `skip` from 0 to 1, may leave the field: it is so steep that it would flatten
    all others.
    """
    across = count_axis([begin, *(x for each in given for x, _ in each.points)])
    up = axis(y for each in given for y in settled(each.points, skip))
    lines = tuple(line(each, across, up) for each in given)
    said = (f"{each.label} from {decimals(each.points[0][1])} to {decimals(each.points[-1][1])}" for each in given)
    return Chart(title, x_title, across, up, lines, f"{title}: " + "; ".join(said))


def against_count(measured: Sequence[tuple[str, Sequence[Point]]], limits: Sequence[Point | None]) -> Chart:
    """Return FID against the number of images, on a scale of its inverse, along which its bias is a line.

    Args:
        measured: label, and (number, FID) of several measurements of the same model, of each model.
        limits: (0, FID∞) of each model, if known.
    """
    counts = sorted({count for _, points in measured for count, _ in points}, reverse=True)
    lowest = 1 / counts[-1]
    across = Axis(0, 1.05 * lowest, _count_ticks(counts, 1.05 * lowest))
    up = axis([fid for _, points in measured for _, fid in points] + [limit[1] for limit in limits if limit])
    lines, said = [], []
    for hue, ((label, points), limit) in enumerate(zip(measured, limits, strict=True)):
        shown = [(1 / count, fid) for count, fid in sorted(points, reverse=True)]
        lines.append(line(Curve(label, shown, hue=hue), across, up))
        said.append(f"{label} " + ", ".join(f"{fid:.2f} of {count:g}" for count, fid in sorted(points)))
        if limit:
            lines.append(line(Curve("", [limit], "open", hue), across, up))
    title = "FID against the number of images"
    return Chart(title, "images", across, up, tuple(lines), f"{title}: " + "; ".join(said))


def _count_ticks(counts: Sequence[float], end: float) -> tuple[tuple[float, str], ...]:
    """Return infinity at 0 and then those counts that leave room for each other's text."""
    ticks = [(0.0, "∞")]
    for count in counts:
        place = round(100 / count / end, 2)
        if place - ticks[-1][0] >= 9:
            ticks.append((place, rounded(count, 1)))
    return tuple(ticks)
