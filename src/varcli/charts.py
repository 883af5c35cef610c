"""Charts: plain numbers in, a PNG or SVG out. matplotlib is imported only where one is drawn.

A chart is panels one above the other. Every axis names its unit, and colours are told apart by everybody
(Okabe and Ito's palette).
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
WIDTH, LINES_HEIGHT, ROW_HEIGHT, MARGINS = 8.0, 3.2, 0.28, 1.15
"""Inches: of every chart, of a panel of curves, of a bar, and of what stands above and below the bars."""
DPI = 120
"""Pixels an inch of a PNG."""
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be searched, and is drawn in the page's own font
    "svg.hashsalt": "varcli",  # equal numbers give equal files
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Horizontal bars, one a label, from the top down."""

    title: str
    unit: str
    """What their length is, and its unit."""
    labels: Sequence[str]
    parts: Mapping[str, Sequence[float]]
    """What each bar is made of, side by side: name to one length a label."""
    notes: Sequence[str] = ()
    """What stands at the end of each bar; its length if not given."""

    @property
    def height(self) -> float:
        """Inches."""
        return MARGINS + ROW_HEIGHT * len(self.labels)

    def draw(self, axes: "Axes") -> None:
        """Draw the bars."""
        rows = range(len(self.labels))
        ends = [0.0] * len(self.labels)
        for (name, lengths), colour in zip(self.parts.items(), COLOURS, strict=False):
            axes.barh(rows, lengths, left=ends, height=0.7, color=colour, label=name)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        for row, (end, note) in enumerate(zip(ends, self.notes or map(digits, ends), strict=True)):
            axes.annotate(note, (end, row), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(rows, self.labels)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(ends, default=0) or 1)  # room for the last note
        axes.set_xlabel(self.unit)
        axes.grid(axis="x")
        _legend(axes, len(self.parts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Curves over a common axis."""

    title: str
    x_unit: str
    y_unit: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """Name to points (x, y)."""
    height: float = field(default=LINES_HEIGHT)
    """Inches."""

    def draw(self, axes: "Axes") -> None:
        """Draw the curves."""
        for (name, points), colour in zip(self.curves.items(), COLOURS, strict=False):
            axes.plot([x for x, _ in points], [y for _, y in points], color=colour, label=name)
        axes.set_xlabel(self.x_unit)
        axes.set_ylabel(self.y_unit)
        axes.grid()
        _legend(axes, len(self.curves))


def png(*panels: Bars | Lines) -> bytes:
    """Return a chart as a PNG, 960 pixels wide."""
    return _rendered(panels, "png")


def svg(*panels: Bars | Lines) -> str:
    """Return a chart as SVG that can stand in an HTML page: one `svg` element, nothing before it."""
    text = _rendered(panels, "svg").decode()
    return text[text.index("<svg") :]


def digits(value: float) -> str:
    """Return a number to three digits, and never as 1e+03."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def _rendered(panels: Sequence[Bars | Lines], kind: str) -> bytes:
    """Draw the panels on a figure of their own: no global state, no window."""
    import matplotlib
    from matplotlib.figure import Figure

    heights = [panel.height for panel in panels]
    written = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, sum(heights)), dpi=DPI, layout="constrained")
        grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
        for panel, axes in zip(panels, grid[:, 0], strict=True):
            panel.draw(axes)
            axes.set_title(panel.title, pad=22 if axes.get_legend() else None)  # points, over the legend
        figure.savefig(written, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return written.getvalue()


def _legend(axes: "Axes", entries: int) -> None:
    """Name the colours above the panel, where there are several."""
    if entries > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=entries, borderaxespad=0, borderpad=0.2)
