"""Which charts a report has: figures side by side, classes in order, training over time."""

import re
from collections.abc import Iterator, Mapping, Sequence

from varcli.report.charts import HUES, Bar, Bars, Chart, Curve, against_count, curves
from varcli.report.evaluations import Evaluation, name
from varcli.report.formatting import fixed
from varcli.report.runs import TrainingRun
from varcli.report.tables import Published

COMPARED = (
    ("fid", "FID, lower is better", 2),
    ("inception_score", "Inception score, higher is better", 1),
    ("precision", "Precision, higher is better", 3),
    ("recall", "Recall, higher is better", 3),
)
"""Figures shown as bars, and digits after their points."""
LONGEST = 98
"""Per cent of the width that the longest bar takes."""
STEEP = 0.02
"""Part of a training run in which its loss falls so fast that all later would look flat beside it."""
VALIDATION = "validation_"
"""Before a journal's figures of held-out images."""


def compared(measured: Sequence[Evaluation], published: Mapping[str, Published]) -> list[Bars]:
    """Return a panel of bars for each figure that there is something to compare with.

    Distances to different references, or of different features, never stand in one panel.
    """
    panels = []
    for metric, title, digits in COMPARED:
        with_it = [each for each in measured if each.metrics.get(metric) is not None]
        grounds = dict.fromkeys([() if metric == "inception_score" else each.ground for each in with_it])
        for ground in grounds:
            chosen = [each for each in with_it if not ground or each.ground == ground]
            papers = [_published(each, metric, published) for each in chosen]
            reference = chosen[0].facts["reference"] if len(grounds) > 1 else None
            if len(chosen) > 1 or papers[0] is not None:
                full = f"{title}, against {reference['name']}" if reference else title
                panels.append(Bars(full, _bars(chosen, metric, digits, papers)))
    return panels


def _published(each: Evaluation, metric: str, published: Mapping[str, Published]) -> float | None:
    """Return the paper's figure, where the evaluation says that it may be compared with the paper."""
    given = each.facts["published"]
    if given and metric in ("fid", "inception_score"):
        return given.get(metric)
    return getattr(published.get(name(each.facts)), metric, None) if given else None


def _bars(
    chosen: Sequence[Evaluation],
    metric: str,
    digits: int,
    papers: Sequence[float | None],
) -> tuple[Bar, ...]:
    limits = [each.metrics.get("fid_infinity") if metric == "fid" else None for each in chosen]
    bands = [(each.facts["published"] or {}).get("band") if metric == "fid" else None for each in chosen]
    values = [each.metrics[metric] for each in chosen]
    ends = [band[1] for band in bands if band]
    scale = LONGEST / (max([*values, *(v for v in [*papers, *limits] if v is not None), *ends]) or 1)

    def place(value: float | None) -> float | None:
        return None if value is None else round(max(0, value) * scale, 2)

    return tuple(
        Bar(
            label=each.label,
            text=fixed(value, digits),
            length=place(value) or 0,
            limit=place(limit),
            published=place(paper),
            published_text="" if paper is None else f"paper {fixed(paper, min(digits, 2))}",
            band=(band[0] * scale, (band[1] - band[0]) * scale) if band else None,
        )
        for each, value, limit, paper, band in zip(chosen, values, limits, papers, bands, strict=True)
    )


def by_count(measured: Sequence[Evaluation]) -> Chart | None:
    """Return FID against the number of images for what was measured with several numbers, None for nothing such."""
    series: dict[tuple[str, ...], list[Evaluation]] = {}
    for each in measured:
        if each.metrics.get("fid") is not None and each.facts["n"]:
            made = each.facts["checkpoint"] or {}
            settings = [
                str(made.get(key)) for key in ("sha256", "cfg", "top_k", "top_p", "smooth", "approximate", "dtype")
            ]
            chosen = [str(each.facts["protocol"].get(key)) for key in ("rejected", "classifier")]
            series.setdefault((name(each.facts), *settings, *chosen, *each.ground), []).append(each)
    several = [found for found in series.values() if len({each.facts["n"] for each in found}) > 1]
    if not several:
        return None
    largest = [max(found, key=lambda each: int(each.facts["n"])) for found in several]
    names = [name(each.facts) for each in largest]
    labels = [short if names.count(short) == 1 else each.label for short, each in zip(names, largest, strict=True)]
    points = [[(float(each.facts["n"]), each.metrics["fid"]) for each in found] for found in several]
    limits = [(0.0, limit) if (limit := each.metrics.get("fid_infinity")) is not None else None for each in largest]
    return against_count(list(zip(labels, points, strict=True)), limits)


def usage(rebuilt: Sequence[Evaluation]) -> Chart | None:
    """Return how much of the codebook each scale uses."""
    given = [
        Curve(each.label, [(scale, share) for scale, share in enumerate(shares, 1)], hue=each.number % HUES)
        for each in rebuilt
        if (shares := each.metrics.get("codebook_usage"))
    ]
    return curves("Codebook in use, scale by scale", "scale", given, begin=1) if given else None


def spread(evaluations: Sequence[Evaluation]) -> Chart | None:
    """Return the spread of each class's images, classes in order of it."""
    given = [
        Curve(each.label, [(rank, value) for rank, (value, _) in enumerate(classes, 1)], hue=each.number % HUES)
        for each in evaluations
        if (classes := classes_by_spread(each))
    ]
    return curves("Spread within each class", "classes, in order of their spread", given, begin=1) if given else None


def classes_by_spread(each: Evaluation) -> list[tuple[float, str]]:
    """Return spread and name of each class that has several images, the lowest first."""
    classes = each.facts["per_class"] or ()
    return sorted(
        (found["spread"], found["name"]) for found in classes if found.get("spread") is not None and found["n"] > 1
    )


def progress(runs: Sequence[TrainingRun]) -> list[Chart]:
    """Return a chart of each figure of training runs of one stage, training and validation together."""
    names = list(dict.fromkeys(name for run in runs for line in run.lines for name in line if name not in UNDRAWN))
    found = dict.fromkeys(family_of(name) for name in names)
    families = [family for family in TITLES if family in found] + [family for family in found if family not in TITLES]
    charts = []
    for family in families:
        members = [name for name in names if family_of(name) == family]
        given = [curve for number in range(len(runs)) for curve in _progress_curves(runs, number, members)]
        if given:
            charts.append(curves(TITLES.get(family, plain(family)), "images seen", given, begin=0, skip=STEEP))
    return charts


def _progress_curves(runs: Sequence[TrainingRun], number: int, members: Sequence[str]) -> Iterator[Curve]:
    """Yield the curves of one run: training and validation, or one for each scale."""
    for rank, member in enumerate(members, 1):
        points = runs[number].points(member)
        held, scale = member.startswith(VALIDATION), re.search(r"\d+$", member)
        which = f"scale {scale[0]}" if scale else "validation" if held else "training"
        label = f"{runs[number].name}, {which}" if len(runs) > 1 else which
        if points:
            strength = 0.35 + 0.65 * rank / len(members) if scale else 1
            yield Curve(label, points, "thick" if held else "thin", number % HUES, strength)


TITLES = {
    "loss": "Loss",
    "loss_last": "Loss, last scale",
    "accuracy": "Token accuracy",
    "accuracy_last": "Token accuracy, last scale",
    "psnr": "PSNR, dB",
    "codebook_usage": "Codebook in use, by scale",
}
"""Headings of a journal's figures; others go by their names."""
UNDRAWN = ("step", "images_seen", "images_per_second")
"""Figures of a journal that no chart shows."""


def family_of(figure: str) -> str:
    """Return what training, validation and all scales of a figure have in common, as in validation_codebook_usage_3."""
    return re.sub(r"_\d+$", "", figure.removeprefix(VALIDATION))


def plain(figure: str) -> str:
    """Return a figure's name as a heading."""
    return figure.replace("_", " ").capitalize()
