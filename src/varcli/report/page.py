"""A report: tables, charts and images, laid out by the templates beside this file."""

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varcli import __version__
from varcli.charts import Bars, Lines, svg
from varcli.errors import UsageError
from varcli.files import check_writable, write_atomically
from varcli.report import charts, load, tables
from varcli.report.formatting import date_and_time, fixed
from varcli.report.load import Evaluation, TrainingRun

PAGE, TEXT = (".html", ".htm"), (".md", ".markdown")
CHART_WIDTH = 3.9
"""Inches; as wide as a phone, and as a column of the page, so that the text of charts is never small."""
EXTREMES = 8
"""Classes shown of each end."""
NAMED = 4
"""Names in the title of a report."""


def write_report(sources: Sequence[str], out: Path) -> None:
    """Write evaluations and training runs on one page, as HTML or, by the ending of the file, as Markdown.

    Args:
        sources: files of results, folders of training runs, "-" for results on standard input.
        out: a name that ends in .html or .md.

    Raises:
        VarError: a source cannot be read, or the page cannot be written.
    """
    if out.suffix.lower() not in PAGE + TEXT:
        raise UsageError(f"--out must end in .html or .md (got {out})")
    check_writable(out)
    evaluations, runs = load.read(sources)
    render = html if out.suffix.lower() in PAGE else markdown
    write_atomically(out, render(evaluations, runs))


def html(evaluations: Sequence[Evaluation], runs: Sequence[TrainingRun]) -> bytes:
    """Render one HTML page that needs no other file, no network and no script."""
    return _render("report.html", _text_contents(evaluations, runs) | _image_contents(evaluations))


def markdown(evaluations: Sequence[Evaluation], runs: Sequence[TrainingRun]) -> bytes:
    """Render the tables and warnings as Markdown."""
    return _render("report.md", _text_contents(evaluations, runs))


def _render(template: str, contents: Mapping[str, Any]) -> bytes:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    is_page = template.endswith(".html")
    environment = Environment(
        loader=PackageLoader("varcli.report"),
        autoescape=is_page,
        finalize=None if is_page else escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(template).render(contents)
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text).encode()


def escape_markdown(value: Any) -> Any:
    """Escape a text so that Markdown shows it as it is, on one line; other values stay as they are."""
    return re.sub(r"([\\`*_\[\]<>|&~#$])", r"\\\1", " ".join(value.split())) if isinstance(value, str) else value


def _text_contents(evaluations: Sequence[Evaluation], runs: Sequence[TrainingRun]) -> dict[str, Any]:
    """Everything that both templates show."""
    measured, reconstructed = _by_kind(evaluations)
    published = any(each.result.published for each in measured)
    caption = "What was measured" + (", and what the paper gives" if published else "")
    labels = [each.label for each in evaluations]
    settings = [tables.evaluation_settings(each.result) for each in evaluations]
    stages = [[run for run in runs if run.stage == stage] for stage in ("tokenizer", "transformer")]
    return {
        "title": _title([each.name for each in evaluations] + [run.name for run in runs]),
        "dates": sorted({date_and_time(each.result.date) for each in evaluations}),
        "version": __version__,
        "warnings": [(each.label, each.result.warnings) for each in evaluations if each.result.warnings],
        "measured": tables.figures_table(caption, measured) if measured else None,
        "reconstructed": tables.figures_table("Reconstructed images", reconstructed) if reconstructed else None,
        "directions": tables.directions,
        "extremes": [_extremes(each) for each in evaluations if charts.classes_by_spread(each)],
        "stages": [_stage(chosen) for chosen in stages if chosen],
        "settings": tables.settings_tables("Evaluation", labels, settings) if evaluations else [],
    }


def _image_contents(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Everything that only the page shows: charts and images."""
    measured, reconstructed = _by_kind(evaluations)
    return {
        "compared": charts.compared_figures(measured),
        "fid_by_count": charts.fid_by_count(measured),
        "usage": charts.codebook_usage(reconstructed),
        "spreads": charts.class_spreads(evaluations),
        "samples": [(each.label, each.result.images) for each in evaluations if each.result.images],
        "training_charts": charts.training_charts,
        "base64": lambda content: b64encode(content).decode(),
        "draw": _draw,
    }


def _by_kind(evaluations: Sequence[Evaluation]) -> tuple[list[Evaluation], list[Evaluation]]:
    """Those of samples and images, and those of tokenizers."""
    reconstructed = [each for each in evaluations if each.result.what == "tokenizer"]
    return [each for each in evaluations if each not in reconstructed], reconstructed


def _draw(chart: Bars | Lines, name: str) -> Any:
    """Draw a chart for the page; its text has been escaped."""
    from markupsafe import Markup

    return Markup(svg(chart, name=name, width=CHART_WIDTH, titled=False))


def _title(names: Sequence[str]) -> str:
    different = list(dict.fromkeys(names))
    return ", ".join(different[:NAMED]) + (f" and {len(different) - NAMED} more" if len(different) > NAMED else "")


def _extremes(evaluation: Evaluation) -> tuple[str, list[tuple[str, str]], list[tuple[str, str]]]:
    """The classes with the lowest and with the highest spread, name and figure; at most half of all each."""
    classes = [(each.name, fixed(each.spread, 2)) for each in charts.classes_by_spread(evaluation)]
    shown = min(EXTREMES, (len(classes) + 1) // 2)
    return evaluation.label, classes[:shown], classes[shown:][-EXTREMES:][::-1]


def _stage(runs: Sequence[TrainingRun]) -> dict[str, Any]:
    """Runs of one stage with their tables."""
    known = [run for run in runs if run.settings]
    settings = [tables.training_settings(run) for run in known]
    return {
        "name": runs[0].stage,
        "runs": runs,
        "table": tables.training_table(runs),
        "settings": tables.settings_tables("Training", [run.name for run in known], settings) if known else [],
    }
