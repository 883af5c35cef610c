"""Tables of a report: figures beside published ones, training runs, and all settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from varcli.checkpoints.registry import registry
from varcli.evaluation.comparability import PUBLISHED_IMAGES
from varcli.evaluation.results import FIGURES, Result
from varcli.report import formatting
from varcli.report.formatting import NONE, decimals, fixed, grouped, heading
from varcli.report.load import Evaluation, TrainingRun


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table."""

    text: str
    detail: str = ""
    """Less important, after the text."""
    number: bool = False
    """Whether it lines up with the numbers above and below."""
    alarm: bool = False
    """Whether to look at it first."""

    @property
    def empty(self) -> bool:
        """Whether nothing was measured."""
        return self.text == NONE


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    head: str
    cells: tuple[Cell, ...]
    published: bool = False
    """Whether it is the paper's."""
    warnings: int = 0
    """Number of warnings of the result."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a heading for every column and every row; rows in groups."""

    caption: str
    headings: tuple[str, ...]
    """Of all columns, that of the rows' heads first."""
    groups: tuple[tuple[Row, ...], ...]


def without_empty_columns(caption: str, headings: Sequence[str], groups: Sequence[Sequence[Row]]) -> Table:
    """Make a table of the columns that are not empty."""
    kept = [i for i in range(len(headings) - 1) if any(not row.cells[i].empty for rows in groups for row in rows)]
    slim = [
        tuple(Row(row.head, tuple(row.cells[i] for i in kept), row.published, row.warnings) for row in rows)
        for rows in groups
    ]
    return Table(caption, (headings[0], *(headings[i + 1] for i in kept)), tuple(slim))


# --- figures ----------------------------------------------------------------------------------------


def figures_table(caption: str, evaluations: Sequence[Evaluation]) -> Table:
    """Make the headline: results of one checkpoint together, the paper's figures below them."""
    groups: dict[str, list[Row]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.name, []).append(_measured_row(evaluation))
    for evaluation in {
        evaluation.name: evaluation for evaluation in evaluations if evaluation.result.published
    }.values():
        groups[evaluation.name].append(_published_row(evaluation))
    titles = [title for name, figure in FIGURES.items() for title in (heading(figure.title), f"{figure.title}∞")]
    headings = ("Result", "Images", "Reference", *titles, "Reproductions")
    return without_empty_columns(caption, headings, list(groups.values()))


def _measured_row(evaluation: Evaluation) -> Row:
    result = evaluation.result
    reference = result.reference
    cells = (
        Cell(grouped(result.n), number=True),
        Cell(reference.name, formatting.shortened_hash(reference.sha256)) if reference else Cell(NONE),
        *_figure_cells(evaluation),
        _band_cell(result),
    )
    return Row(evaluation.label, cells, warnings=len(result.warnings))


def _published_row(evaluation: Evaluation) -> Row:
    cells: list[Cell] = []
    for name, figure in FIGURES.items():
        value = published_figure(evaluation, name)
        text = NONE if value is None else formatting.as_published(value)
        padding = formatting.FIGURE_SPACE * (figure.digits - len(text.partition(".")[2]))
        cells += (Cell(text if value is None else text + padding, number=True), Cell(NONE, number=True))
    images = Cell(grouped(PUBLISHED_IMAGES), number=True)
    return Row(f"{evaluation.name}, paper", (images, Cell(NONE), *cells, Cell(NONE)), published=True)


def _figure_cells(evaluation: Evaluation) -> Iterator[Cell]:
    """Yield two cells per figure: with its standard deviation, and estimated for infinitely many images."""
    for name, figure in FIGURES.items():
        deviation = evaluation.figure(f"{name}_std")
        detail = "" if deviation is None else f"± {fixed(deviation, figure.digits)}"
        yield Cell(fixed(evaluation.figure(name), figure.digits), detail, number=True)
        yield Cell(fixed(evaluation.figure(f"{name}_infinity"), figure.digits), number=True)


def published_figure(evaluation: Evaluation, name: str) -> float | None:
    """The paper's figure, where the evaluation says that it may be compared with the paper."""
    published = evaluation.result.published
    if published is None:
        return None
    value = getattr(published, name, None)
    return getattr(registry().get(evaluation.name), name, None) if value is None and name in FIGURES else value


def _band_cell(result: Result) -> Cell:
    """Say whether FID lies where others found it who measured the same checkpoint."""
    published = result.published
    if not published or not published.band or published.inside is None:
        return Cell(NONE)
    low, high = published.band
    return Cell("inside" if published.inside else "outside", f"{low:.2f}–{high:.2f}", alarm=not published.inside)


def directions(table: Table) -> str:
    """Say of each figure in a table whether lower or higher is better."""
    shown = [figure for figure in FIGURES.values() if heading(figure.title) in table.headings]
    texts = [
        f"{', '.join(figure.title.partition(',')[0] for figure in chosen)}: {word} is better"
        for word, lower in (("lower", True), ("higher", False))
        if (chosen := [figure for figure in shown if figure.lower_is_better == lower])
    ]
    return heading("; ".join(texts) + ".")


# --- training ---------------------------------------------------------------------------------------

TRAINED = {
    "loss": "Training loss",
    "validation_loss": "Validation loss",
    "validation_loss_last": "… of the last scale",
    "validation_accuracy": "Token accuracy",
    "validation_accuracy_last": "… of the last scale",
    "squared_error": "Squared error",
    "validation_psnr": "PSNR, dB",
    "validation_fid": "FID",
    "validation_rfid": "rFID",
}
"""Figures of a metrics log that stand in the table of runs, where a run has them, and their headings."""


def training_table(runs: Sequence[TrainingRun]) -> Table:
    """Make the table of how far runs of one stage came."""
    headings = ("Run", "Steps", "Images seen", "Images/s", *TRAINED.values())
    return without_empty_columns("Training runs, their last figures", headings, [[_training_row(run) for run in runs]])


def _training_row(run: TrainingRun) -> Row:
    last = run.lines[-1]
    speeds = [value for _, value in run.points("images_per_second")]
    counts = (grouped(last["step"]), grouped(last["images_seen"]), f"{median(speeds):.3g}" if speeds else NONE)
    values = [decimals(points[-1][1]) if (points := run.points(figure)) else NONE for figure in TRAINED]
    return Row(run.name, tuple(Cell(text, number=True) for text in (*counts, *values)))


# --- settings ---------------------------------------------------------------------------------------

SETTING_NAMES = {
    "what": "what was measured",
    "source.paths": "images from",
    "n": "number of images",
    "checkpoint.name": "checkpoint",
    "checkpoint.sha256": "sha256 of the checkpoint",
    "checkpoint.cfg": "guidance (cfg)",
    "reference.name": "reference",
    "reference.sha256": "sha256 of the reference",
    "reference.n": "images in the reference",
    "reference.pixels": "pixels per side of the reference",
    "extractor.name": "extractor",
    "extractor.sha256": "sha256 of the extractor",
    "protocol.is_splits": "splits (IS)",
    "protocol.is_shuffle_seed": "seed of the shuffle (IS)",
    "protocol.kid_subsets": "subsets (KID)",
    "protocol.kid_subset_size": "images per subset (KID)",
    "protocol.prc_k": "neighbours (precision, recall)",
    "protocol.pixels": "pixels per side",
    "protocol.resize": "resized",
    "seconds.total": "time",
    "seconds.images": "time for images",
    "seconds.features": "time for features",
    "version": "varcli",
}
"""Names of settings whose names in the result are not clear."""
SETTINGS = (
    *("checkpoint", "source", "n", "what", "classes", "reference", "extractor", "protocol"),
    *("version", "date", "seconds"),
)
"""Parts of a result that are settings, in the order in which a report shows them."""


def settings_tables(caption: str, labels: Sequence[str], settings: Sequence[Mapping[str, str]]) -> list[Table]:
    """Make a table of the settings that differ, the narrower way round, and one of those that are the same."""
    paths = list(dict.fromkeys(path for each in settings for path in each))
    differing = [path for path in paths if len({each.get(path, NONE) for each in settings}) > 1]
    same = [Row(_setting_name(path), (Cell(settings[0].get(path, NONE)),)) for path in paths if path not in differing]
    headings = list(map(_setting_name, differing))
    cells = [[Cell(formatting.shortened_hash(each.get(path, NONE))) for path in differing] for each in settings]
    if len(differing) > len(labels):
        labels, headings, cells = headings, list(labels), [list(column) for column in zip(*cells, strict=True)]
    rows = [Row(label, tuple(row)) for label, row in zip(labels, cells, strict=True)]
    tables = []
    if differing:
        tables.append(without_empty_columns(f"{caption}: where they differ", ("", *headings), [rows]))
    title = caption if len(settings) == 1 else f"{caption}: the same for all"
    tables.append(without_empty_columns(title, ("Setting", "Value"), [same]))
    return [table for table in tables if table.groups[0] and len(table.headings) > 1]


def evaluation_settings(result: Result) -> dict[str, str]:
    """All settings of a result by their path, in words."""
    facts, settings = result.facts(), dict[str, str]()
    for part in SETTINGS:
        value = facts[part]
        if isinstance(value, dict):
            settings |= {f"{part}.{name}": _setting(part, name, each) for name, each in value.items()}
        elif value is not None:
            settings[part] = _setting(part, part, value)
    return settings


def _setting(part: str, name: str, value: Any) -> str:
    if part == "seconds":
        return formatting.duration(value)
    return formatting.date_and_time(value) if part == "date" else formatting.setting(name, value)


def training_settings(run: TrainingRun) -> dict[str, str]:
    """All settings of a training run, in words."""
    return {name: formatting.setting(name, value) for name, value in run.settings.items()}


def _setting_name(path: str) -> str:
    part, _, name = path.rpartition(".")
    return SETTING_NAMES.get(path, name.replace("_", "-" if part == "checkpoint" else " "))
