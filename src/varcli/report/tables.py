"""Tables of a report: what was measured beside what was published, how training went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from varcli.report import formatting
from varcli.report.evaluations import Evaluation, Facts, name
from varcli.report.formatting import NONE, fixed, grouped
from varcli.report.runs import TrainingRun


@dataclass(frozen=True, slots=True)
class Published:
    """Figures of the paper's table that an evaluation's result does not repeat."""

    precision: float | None
    recall: float | None


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in one place of a table."""

    text: str
    detail: str = ""
    """What belongs to it and is less important."""
    number: bool = False
    """Whether it lines up with the numbers above and below."""
    alarm: bool = False
    """Whether to look at it first."""

    @property
    def empty(self) -> bool:
        """Whether nothing was measured."""
        return self.text == NONE


EMPTY = Cell(NONE, number=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    head: str
    cells: tuple[Cell, ...]
    published: bool = False
    """Whether it is the paper's."""
    warnings: int = 0
    """How many the result came with."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a heading for every column and every row; rows in groups."""

    caption: str
    headings: tuple[str, ...]
    """Of all columns, that of the rows' heads first."""
    groups: tuple[tuple[Row, ...], ...]


def table(caption: str, headings: Sequence[str], groups: Sequence[Sequence[Row]]) -> Table:
    """Return a table without the columns that nothing stands in."""
    kept = [i for i in range(len(headings) - 1) if any(not row.cells[i].empty for rows in groups for row in rows)]
    slim = [
        tuple(Row(row.head, tuple(row.cells[i] for i in kept), row.published, row.warnings) for row in rows)
        for rows in groups
    ]
    return Table(caption, (headings[0], *(headings[i + 1] for i in kept)), tuple(slim))


MEASURED = (
    "Result",
    "Images",
    "Reference",
    "FID",
    "FID∞",
    "IS",
    "KID\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10³",
    "Precision",
    "Recall",
    "Reproductions",
)


def measured(results: Sequence[Evaluation], published: Mapping[str, Published]) -> Table:
    """Return the headline: results of one checkpoint together, the paper's figures below them."""
    groups: dict[str, list[Row]] = {}
    paper: dict[str, Row] = {}
    for result in results:
        group = name(result.facts)
        groups.setdefault(group, []).append(_measured_row(result))
        if result.facts["published"]:
            paper[group] = _paper_row(group, result.facts["published"], published.get(group, Published(None, None)))
    rows = [[*rows, *([paper[group]] if group in paper else [])] for group, rows in groups.items()]
    return table("What was measured" + (", and what the paper gives" if paper else ""), MEASURED, rows)


def _measured_row(result: Evaluation) -> Row:
    metrics = result.metrics
    cells = (
        Cell(grouped(result.facts["n"]), number=True),
        reference_cell(result.facts),
        figure(metrics, "fid", 2),
        figure(metrics, "fid_infinity", 2),
        figure(metrics, "inception_score", 1),
        figure(metrics, "kid", 2, scale=1000),
        figure(metrics, "precision", 3),
        figure(metrics, "recall", 3),
        band_cell(result.facts["published"]),
    )
    return Row(result.label, cells, warnings=len(result.facts["warnings"] or ()))


def _paper_row(group: str, given: Facts, paper: Published) -> Row:
    """Return the paper's figures, whose rates have a digit less than ours."""
    precision, recall = (
        EMPTY if rate is None else Cell(fixed(rate, 2) + formatting.FIGURE_SPACE, number=True)
        for rate in (paper.precision, paper.recall)
    )
    fid, score = figure(given, "fid", 2), figure(given, "inception_score", 1)
    images = Cell(grouped(50_000), number=True)
    cells = (images, Cell(NONE), fid, EMPTY, score, EMPTY, precision, recall, Cell(NONE))
    return Row(f"{group}, paper", cells, published=True)


def figure(metrics: Facts, metric: str, digits: int, scale: float = 1) -> Cell:
    """Return a figure, and its standard deviation if that is known."""
    deviation = metrics.get(f"{metric}_std")
    detail = "" if deviation is None else f"± {fixed(deviation, digits, scale)}"
    return Cell(fixed(metrics.get(metric), digits, scale), detail, number=True)


def reference_cell(facts: Facts) -> Cell:
    """Return a reference's name and the beginning of its hash."""
    reference = facts["reference"]
    return Cell(reference["name"], formatting.shortened_hash(reference["sha256"])) if reference else Cell(NONE)


def band_cell(published: Facts | None) -> Cell:
    """Return whether an FID lies where others found it who measured the same checkpoint."""
    if not published or not published.get("band") or published.get("inside") is None:
        return Cell(NONE)
    low, high = published["band"]
    inside = published["inside"]
    return Cell("inside" if inside else "outside", f"{low:.2f}–{high:.2f}", alarm=not inside)


REBUILT = ("Tokenizer", "Images", "Reference", "rFID", "rFID∞", "PSNR, dB", "SSIM", "LPIPS")
REBUILT_DIGITS = {"rfid": 2, "rfid_infinity": 2, "psnr": 2, "ssim": 3, "lpips": 3}


def rebuilt(results: Sequence[Evaluation]) -> Table:
    """Return the table of reconstructions."""
    rows = [
        Row(
            result.label,
            (
                Cell(grouped(result.facts["n"]), number=True),
                reference_cell(result.facts),
                *(figure(result.metrics, metric, digits) for metric, digits in REBUILT_DIGITS.items()),
            ),
            warnings=len(result.facts["warnings"] or ()),
        )
        for result in results
    ]
    return table("Images after the tokenizer, there and back", REBUILT, [rows])


def trained(runs: Sequence[TrainingRun], figures: Mapping[str, str]) -> Table:
    """Return how far runs of one stage came; `figures` are names of the journal and their headings."""
    headings = ("TrainingRun", "Updates", "Images seen", "Images/s", *figures.values())
    return table("Training runs, their last figures", headings, [[_trained_row(run, list(figures)) for run in runs]])


def _trained_row(run: TrainingRun, figures: Sequence[str]) -> Row:
    last = run.lines[-1]
    speeds = [value for _, value in run.points("images_per_second")]
    made = (grouped(last["step"]), grouped(last["images_seen"]), f"{median(speeds):.3g}" if speeds else NONE)
    values = [formatting.decimals(points[-1][1]) if (points := run.points(figure)) else NONE for figure in figures]
    return Row(run.name, tuple(Cell(text, number=True) for text in (*made, *values)))
