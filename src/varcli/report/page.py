"""A report put together: tables, charts and images, laid out by the templates beside this file."""

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

from varcli import __version__
from varcli.report import panels, settings, tables
from varcli.report.evaluations import Evaluation, name
from varcli.report.formatting import fixed, moment
from varcli.report.runs import TrainingRun
from varcli.report.tables import Published

EXTREMES = 8
"""Classes shown of each end."""
NAMED = 4
"""Names in the title of a report."""
TRAINED = {
    "loss": "Training loss",
    "validation_loss": "Validation loss",
    "validation_loss_last": "… of the last scale",
    "validation_accuracy": "Token accuracy",
    "validation_accuracy_last": "… of the last scale",
    "squared_error": "Squared error",
    "validation_psnr": "PSNR, dB",
}
"""Figures of a journal that stand in the table of runs, where a run has them, and their headings."""


def html(evaluations: Sequence[Evaluation], runs: Sequence[TrainingRun], published: Mapping[str, Published]) -> bytes:
    """Return the report as one HTML page that needs no other file, no network and no script.

    Args:
        evaluations: results of `var eval`.
        runs: training runs.
        published: a paper's figures by the name of the checkpoint.
    """
    return _rendered("report.html", contents(evaluations, runs, published))


def markdown(
    evaluations: Sequence[Evaluation], runs: Sequence[TrainingRun], published: Mapping[str, Published]
) -> bytes:
    """Return the report's tables and warnings as Markdown."""
    return _rendered("report.md", contents(evaluations, runs, published))


def _rendered(template: str, given: Mapping[str, Any]) -> bytes:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    is_page = template.endswith(".html")
    environment = Environment(
        loader=PackageLoader("varcli.report"),
        autoescape=is_page,
        finalize=None if is_page else in_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(template).render(given)
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text).encode()


def in_markdown(value: Any) -> Any:
    """Return a text so that Markdown shows it as it is, on one line; other values unchanged."""
    return re.sub(r"([\\`*_\[\]<>|&~#$])", r"\\\1", " ".join(value.split())) if isinstance(value, str) else value


def contents(
    evaluations: Sequence[Evaluation], runs: Sequence[TrainingRun], published: Mapping[str, Published]
) -> dict[str, Any]:
    """Return all that the templates show."""
    rebuilt = [each for each in evaluations if each.facts["what"] == "tokenizer"]
    measured = [each for each in evaluations if each.facts["what"] != "tokenizer"]
    labels = [each.label for each in evaluations]
    given = [settings.of_evaluation(each.facts) for each in evaluations]
    stages = [[run for run in runs if run.stage == stage] for stage in ("tokenizer", "transformer")]
    return {
        "title": title([name(each.facts) for each in evaluations] + [run.name for run in runs]),
        "dates": sorted({moment(each.facts["date"]) for each in evaluations}),
        "version": __version__,
        "warnings": [(each.label, each.facts["warnings"]) for each in evaluations if each.facts["warnings"]],
        "measured": tables.measured(measured, published) if measured else None,
        "compared": panels.compared(measured, published),
        "by_count": panels.by_count(measured),
        "rebuilt": tables.rebuilt(rebuilt) if rebuilt else None,
        "usage": panels.usage(rebuilt),
        "samples": [(each.label, each.facts["pictures"]) for each in evaluations if each.facts["pictures"]],
        "spread": panels.spread(evaluations),
        "extremes": [extremes(each) for each in evaluations if panels.classes_by_spread(each)],
        "stages": [stage(chosen) for chosen in stages if chosen],
        "settings": settings.common_and_differing("Evaluation", labels, given) if evaluations else [],
    }


def title(names: Sequence[str]) -> str:
    """Return what a report is about."""
    different = list(dict.fromkeys(names))
    return ", ".join(different[:NAMED]) + (f" and {len(different) - NAMED} more" if len(different) > NAMED else "")


def extremes(each: Evaluation) -> tuple[str, list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the classes with the lowest and with the highest spread, name and figure; at most half of all each."""
    classes = [(name, fixed(value, 2)) for value, name in panels.classes_by_spread(each)]
    shown = min(EXTREMES, (len(classes) + 1) // 2)
    return each.label, classes[:shown], classes[shown:][-EXTREMES:][::-1]


def stage(runs: Sequence[TrainingRun]) -> dict[str, Any]:
    """Return what a report shows of runs of one stage."""
    told = [run for run in runs if run.settings]
    return {
        "name": runs[0].stage,
        "table": tables.trained(runs, TRAINED),
        "charts": panels.progress(runs),
        "sheets": [(run.name, base64.b64encode(run.sheet).decode()) for run in runs if run.sheet],
        "settings": settings.common_and_differing(
            "Training", [run.name for run in told], [settings.of_run(run.settings) for run in told]
        ),
    }
