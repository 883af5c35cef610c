"""Which charts a report has: figures side by side, classes in order of their spread, training over time."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields

from varcli.charts import FEW, Bars, Curve, Lines, Point, count_text
from varcli.config import SampleConfig
from varcli.evaluation.metrics import Figure
from varcli.evaluation.results import FIGURES, ClassSpread
from varcli.report.formatting import as_published, fixed, heading
from varcli.report.load import SELECTION, Evaluation, TrainingRun
from varcli.report.tables import published_figure

WITHOUT_REFERENCE = ("inception_score",)
"""Figures that are comparable whatever the reference."""
STEEP = 0.02
"""Part of a training run in which its loss falls so fast that the rest would look flat beside it."""
VALIDATION = "validation_"
"""Begins the names of a metrics log's figures of held-out images."""


def compared_figures(evaluations: Sequence[Evaluation]) -> list[Bars]:
    """Bars of each figure that can be compared with another.

    Distances to different references, or of different features, never stand in one chart.
    """
    charts = []
    for name, figure in FIGURES.items():
        measured = [each for each in evaluations if each.figure(name) is not None]
        keys = dict.fromkeys(() if name in WITHOUT_REFERENCE else each.comparison_key for each in measured)
        for key in keys:
            chosen = [each for each in measured if not key or each.comparison_key == key]
            if len(chosen) > 1 or published_figure(chosen[0], name) is not None:
                reference = chosen[0].result.reference if len(keys) > 1 else None
                charts.append(_bars(name, figure, chosen, f", against {reference.name}" if reference else ""))
    return charts


def _bars(name: str, figure: Figure, chosen: Sequence[Evaluation], against: str) -> Bars:
    values = [each.figure(name) or 0 for each in chosen]
    published = [published_figure(each, name) for each in chosen]
    limits = [each.figure(f"{name}_infinity") for each in chosen]
    better = "lower" if figure.lower_is_better else "higher"
    texts = ["" if value is None else f" · paper {as_published(value)}" for value in published]
    return Bars(
        title=f"{heading(figure.title)}, {better} is better{against}",
        unit=figure.title,
        labels=[each.label for each in chosen],
        parts={figure.title: [max(0, value) for value in values]},
        notes=[fixed(value, figure.digits) + text for value, text in zip(values, texts, strict=True)],
        targets=published,
        rings=[None if limit is None else max(0, limit) for limit in limits],
        bands=[each.result.published.band if each.result.published and name == "fid" else None for each in chosen],
        narrow=True,
    )


def fid_by_count(evaluations: Sequence[Evaluation]) -> Lines | None:
    """FID against the inverse of the number of images, along which its bias is a line, to FID∞ at 0.

    None unless something was measured with several numbers of images.
    """
    options = ["sha256", *(option.name for option in fields(SampleConfig)), "dtype"]
    series: dict[tuple[str, ...], list[Evaluation]] = {}
    for each in sorted(evaluations, key=lambda each: each.result.n, reverse=True):
        if each.figure("fid") is not None and each.result.n:
            settings = [str((each.result.checkpoint or {}).get(option)) for option in options]
            selection = [str(each.result.protocol.get(part)) for part in SELECTION]
            series.setdefault((each.name, *settings, *selection, *each.comparison_key), []).append(each)
    several = [group for group in series.values() if group[0].result.n > group[-1].result.n]
    if not several:
        return None
    names = [group[0].name for group in several]
    curves = []
    for color, (name, group) in enumerate(zip(names, several, strict=True)):
        label = name if names.count(name) == 1 else group[0].label
        points = [(1 / each.result.n, each.figure("fid") or 0) for each in group]
        curves.append(Curve(label=label, points=points, color=color, marked=True))
        if (limit := group[0].figure("fid_infinity")) is not None:
            curves.append(Curve(label="", points=[(0, limit)], color=color, hollow=True))
    end = 1.05 * max(x for curve in curves for x, _ in curve.points)
    counts = sorted({each.result.n for group in several for each in group}, reverse=True)
    title = "FID against the number of images"
    return Lines(title=title, x_unit="images", curves=curves, x_limits=(0, end), x_ticks=_count_ticks(counts, end))


def _count_ticks(counts: Iterable[int], end: float) -> list[tuple[float, str]]:
    """Infinity at 0, and then those counts that leave room for each other's text."""
    ticks = [(0.0, "∞")]
    for count in counts:
        if 1 / count - ticks[-1][0] >= 0.12 * end:
            ticks.append((1 / count, count_text(count)))
    return ticks


def codebook_usage(evaluations: Sequence[Evaluation]) -> Lines | None:
    """How much of the codebook each scale uses, None where it was not measured."""
    curves = [
        Curve(label=each.label, points=list(enumerate(shares, 1)), color=each.number)
        for each in evaluations
        if isinstance(shares := each.result.metrics.get("codebook_usage"), Sequence) and shares
    ]
    if not curves:
        return None
    ticks = [(scale, str(scale)) for scale in range(1, max(len(curve.points) for curve in curves) + 1)]
    return Lines(title="Codebook usage per scale", x_unit="scale", curves=curves, x_ticks=ticks)


def class_spreads(evaluations: Sequence[Evaluation]) -> Lines | None:
    """The spread of each class's images, classes in order of it; None where classes are unknown."""
    curves = [
        Curve(label=each.label, points=[(i, one.spread) for i, one in enumerate(classes, 1)], color=each.number)
        for each in evaluations
        if (classes := classes_by_spread(each))
    ]
    title, unit = "Spread within each class", "classes, in order of their spread"
    return Lines(title=title, x_unit=unit, curves=curves) if curves else None


def classes_by_spread(evaluation: Evaluation) -> list[ClassSpread]:
    """The classes that have several images, the one of the lowest spread first."""
    several = [each for each in evaluation.result.per_class or () if each.n > 1]
    return sorted(several, key=lambda each: (each.spread, each.name))


# --- training ---------------------------------------------------------------------------------------

TITLES = {
    "loss": "Loss",
    "loss_last": "Loss, last scale",
    "accuracy": "Token accuracy",
    "accuracy_last": "Token accuracy, last scale",
    "psnr": "PSNR, dB",
    "loss_scale": "Loss per scale",
    "accuracy_scale": "Token accuracy per scale",
    "codebook_usage": "Codebook usage per scale",
    "codebook_perplexity": "Codebook perplexity per scale",
}
"""Titles of a metrics log's figures; others go by their names."""
NOT_DRAWN = ("step", "images_seen", "images_per_second", "seconds_left", "memory_gib")
"""Figures of a metrics log that no chart shows."""


def training_charts(runs: Sequence[TrainingRun]) -> list[Lines]:
    """A chart of each figure of training runs of one stage, training and validation together."""
    names = list(dict.fromkeys(name for run in runs for line in run.lines for name in line if name not in NOT_DRAWN))
    families = dict.fromkeys(map(_family, names))
    charts = []
    for family in [*(name for name in TITLES if name in families), *(name for name in families if name not in TITLES)]:
        members = [name for name in names if _family(name) == family]
        if any(_SCALE.search(name) for name in members):  # a curve per scale is enough
            members = [name for name in members if name.startswith(VALIDATION)] or members
        curves = [curve for number in range(len(runs)) for curve in _training_curves(runs, number, members)]
        if curves:
            title = TITLES.get(family, family.replace("_", " ").capitalize())
            values = [y for curve in curves for y in _after_the_beginning(curve.points)]
            margin = 0.05 * (max(values) - min(values)) or None
            limits = (min(values) - margin, max(values) + margin) if margin else (None, None)
            charts.append(Lines(title=title, x_unit="images seen", curves=curves, x_limits=(0, None), y_limits=limits))
    return charts


def _family(figure: str) -> str:
    """What training, validation and all scales of a figure have in common, as in validation_codebook_usage_3."""
    return _SCALE.sub("", figure.removeprefix(VALIDATION))


_SCALE = re.compile(r"_(\d+)$")
"""Ends the names of figures of single scales."""


def _training_curves(runs: Sequence[TrainingRun], number: int, members: Sequence[str]) -> Iterator[Curve]:
    """Yield the curves of one run: training and validation, or one per scale."""
    for order, member in enumerate(members, 1):
        points = runs[number].points(member)
        held_out, scale = member.startswith(VALIDATION), _SCALE.search(member)
        which = f"scale {scale[1]}" if scale else "validation" if held_out else "training"
        label = f"{runs[number].name}, {which}" if len(runs) > 1 else which
        if points:
            opacity = 0.35 + 0.65 * order / len(members) if scale else 1
            yield Curve(label=label, points=points, color=number, width=1.8 if held_out else 0.8, opacity=opacity)


def _after_the_beginning(points: Sequence[Point]) -> list[float]:
    """The values that decide the scale of a chart: of a long curve, those after its steep beginning."""
    begin = STEEP * points[-1][0] if len(points) > FEW else 0
    return [y for x, y in points if x >= begin]
