"""Charts of numbers, as PNG files or as SVG for a web page. matplotlib is imported only where one is drawn.

A chart is one or more panels, one above the other. Every axis names its unit, and colour-blind people can
distinguish the colours (Okabe and Ito's palette).
"""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Point = tuple[float, float]

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
INK, PAGE, GRID, BAND = "#1b1d21", "#fefefe", "#dddddd", "#9aa0a8"
THEME = {color: f"--hue{i}" for i, color in enumerate(COLORS)} | {
    INK: "--ink",
    PAGE: "--page",
    GRID: "--line",
    BAND: "--band",
}
"""CSS variables by which a page may replace the colours of an SVG, for instance in dark mode."""
WIDTH = 8.0
"""Inches, of a PNG; an SVG stretches with the page."""
DPI = 120
"""Pixels per inch of a PNG."""
TITLE, MARGINS, CURVES_HEIGHT, LEGEND_LINE = 0.3, 0.65, 2.25, 0.21
"""Inches: of a title, of an axis with its unit, of a field of curves, of a line of the legend."""
LETTER = 0.085
"""Inches that a letter takes."""
FEW = 40
"""Up to this number the points of a curve are drawn one by one."""
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.formatter.useoffset": False,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be searched, and is drawn in the page's own font
    "svg.hashsalt": "varcli",  # equal numbers give equal files
    "text.color": INK,
    "text.parse_math": False,  # a name may have dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Horizontal bars, one per label, from the top down."""

    title: str
    unit: str
    """What their length is, and its unit."""
    labels: Sequence[str]
    parts: Mapping[str, Sequence[float]]
    """What each bar is made of, side by side: name to one length per label."""
    notes: Sequence[str] = ()
    """Text beside each bar; its length if not given."""
    targets: Sequence[float | None] = ()
    """Per bar, a value to compare it with: an upright line."""
    rings: Sequence[float | None] = ()
    """Per bar, another estimate of its value: a ring."""
    bands: Sequence[Point | None] = ()
    """Per bar, the lowest and the highest of other values: a grey band."""
    narrow: bool = False
    """Labels and notes above the bars instead of beside them, for a chart as narrow as a phone."""

    @property
    def legend(self) -> list[str]:
        """Names of the parts."""
        return list(self.parts)

    @property
    def texts(self) -> list[str]:
        """The notes, or lengths."""
        totals = map(sum, zip(*self.parts.values(), strict=True))
        return list(self.notes) or [digits(total) for total in totals]

    @property
    def description(self) -> str:
        """The chart in words."""
        return f"{self.title}: " + "; ".join(map(" ".join, zip(self.labels, self.texts, strict=True)))

    def height(self, width: float) -> float:
        """Inches without the title, in a chart this many inches wide."""
        legend = LEGEND_LINE * _legend_rows(self.legend, width)
        return legend + (0.1 + 0.48 * len(self.labels) if self.narrow else MARGINS + 0.28 * len(self.labels))

    def draw(self, axes: "Axes", width: float) -> None:
        """Draw the bars."""
        rows, thickness = range(len(self.labels)), 0.42 if self.narrow else 0.7
        ends, handles = [0.0] * len(self.labels), []
        for number, lengths in enumerate(self.parts.values()):
            color = COLORS[number % len(COLORS)]
            handles.append(axes.barh(rows, lengths, left=ends, height=thickness, color=color))
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        marks = [mark for mark in (*self.targets, *self.rings) if mark is not None]
        end = max([*ends, *marks, *(band[1] for band in self.bands if band)], default=0)
        for row, band in enumerate(self.bands):
            if band:
                axes.barh(row, band[1] - band[0], left=band[0], height=thickness + 0.1, color=BAND, alpha=0.6)
        for row, target in enumerate(self.targets):
            if target is not None:
                axes.vlines(target, row - 0.28, row + 0.28, color=INK, linewidth=2)
        for row, ring in enumerate(self.rings):
            if ring is not None:
                axes.plot(ring, row, "o", markersize=7, markerfacecolor=PAGE, markeredgecolor=INK, clip_on=False)
        axes.set_xlim(0, (1.0 if self.narrow else 1.2) * end or 1)  # room for the last note
        axes.set_ylim(len(self.labels) - 0.55, -0.85 if self.narrow else -0.6)
        if self.narrow:
            self._write_above(axes, width)
        else:
            self._write_beside(axes, ends, width)
        _add_legend(axes, handles, self.legend, width)

    def _write_beside(self, axes: "Axes", ends: Sequence[float], width: float) -> None:
        for row, (end, text) in enumerate(zip(ends, self.texts, strict=True)):
            axes.annotate(drawable(text), (end, row), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(self.labels)), [shortened(label, int(width / LETTER / 2)) for label in self.labels])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(self.unit)
        axes.grid(axis="x")

    def _write_above(self, axes: "Axes", width: float) -> None:
        place = axes.get_yaxis_transform()
        for row, (label, text) in enumerate(zip(self.labels, self.texts, strict=True)):
            fitting = shortened(label, int(width / LETTER) - len(text) - 2)
            axes.text(0, row - 0.3, fitting, transform=place, va="bottom").set_in_layout(False)
            axes.text(1, row - 0.3, drawable(text), transform=place, va="bottom", ha="right").set_in_layout(False)
        axes.axis("off")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Points (x, y) and what joins them."""

    label: str
    """In the legend, which has no line for an empty one."""
    points: Sequence[Point]
    color: int
    """Which of `COLORS`; after the last they come again, dashed."""
    width: float = 1.8
    """Points; 0 leaves the points of the curve unjoined."""
    opacity: float = 1.0
    marked: bool | None = None
    """Whether every point is shown; where None, if they are few and the line is thick."""
    hollow: bool = False
    """Show points as rings."""
    band: Sequence[Point] = ()
    """Per point, the lowest and the highest value: an interval."""

    def draw(self, axes: "Axes") -> Any:
        """Draw the curve; its entry of the legend is returned."""
        xs, ys = [x for x, _ in self.points], [y for _, y in self.points]
        color = COLORS[self.color % len(COLORS)]
        marked = self.marked
        if marked is None:
            marked = self.hollow or not self.width or len(xs) == 1 or (self.width > 1 and len(xs) <= FEW)
        if self.band:
            axes.fill_between(
                xs, [low for low, _ in self.band], [high for _, high in self.band], color=color, alpha=0.2
            )
        (line,) = axes.plot(
            xs,
            ys,
            color=color,
            linewidth=self.width,
            linestyle=("-", "--")[self.color // len(COLORS) % 2] if self.width else "",
            marker="o" if marked else "",
            markersize=7 if self.hollow else 4,
            markerfacecolor=PAGE if self.hollow else color,
            markeredgewidth=1.5 if self.hollow else 0,
            alpha=self.opacity,
            clip_on=not self.hollow,
            zorder=3 if self.hollow else 2,
        )
        return line


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Curves over a common axis."""

    title: str
    x_unit: str
    y_unit: str = ""
    curves: Sequence[Curve]
    x_log: bool = False
    y_log: bool = False
    x_limits: tuple[float | None, float | None] = (None, None)
    y_limits: tuple[float | None, float | None] = (None, None)
    """Ends of the axes; those of the values where None."""
    x_ticks: Sequence[tuple[float, str]] | None = None
    """Places on the horizontal axis and their text, instead of round numbers."""

    @property
    def legend(self) -> list[str]:
        """Labels of the curves that have one."""
        return [curve.label for curve in self.curves if curve.label]

    @property
    def description(self) -> str:
        """The chart in words: where each curve begins and ends."""
        ends = (
            f"{curve.label} from {curve.points[0][1]:.4g} to {curve.points[-1][1]:.4g}"
            for curve in self.curves
            if curve.label and curve.points
        )
        return f"{self.title}: " + "; ".join(ends)

    def height(self, width: float) -> float:
        """Inches without the title, in a chart this many inches wide."""
        return MARGINS + CURVES_HEIGHT + LEGEND_LINE * _legend_rows(self.legend, width)

    def draw(self, axes: "Axes", width: float) -> None:
        """Draw the curves."""
        if self.x_log:
            axes.set_xscale("log")
        if self.y_log:
            axes.set_yscale("log")
        handles = [handle for curve in self.curves if (handle := curve.draw(axes)) and curve.label]
        axes.set_xlim(*self.x_limits)
        axes.set_ylim(*self.y_limits)
        if self.x_ticks is not None:
            axes.set_xticks([place for place, _ in self.x_ticks], [text for _, text in self.x_ticks])
        elif not self.x_log:
            axes.xaxis.set_major_formatter(lambda value, _: count_text(value))
        for axis in [axes.xaxis] * self.x_log + [axes.yaxis] * self.y_log:
            _number_logarithmic(axis)
        axes.set_xlabel(self.x_unit)
        axes.set_ylabel(self.y_unit)
        axes.grid()
        _add_legend(axes, handles, self.legend, width)


def png(*panels: Bars | Lines) -> bytes:
    """Draw a chart as a PNG, 960 pixels wide."""
    return _rendered(panels, WIDTH, "png")


def svg(*panels: Bars | Lines, name: str, width: float = WIDTH, titled: bool = True) -> str:
    """Draw a chart as SVG for an HTML page: one `svg` element that names and describes itself.

    It takes the page's colours where that sets the variables of `THEME`, and leaves the page's styles alone.

    Args:
        panels: what to draw.
        name: unique on the page; ids begin with it.
        width: inches; the text is 10 points high where the chart is shown at this width.
        titled: whether the panels' titles are drawn, for pages that do not write them as text.
    """
    root = ElementTree.fromstring(_rendered(panels, width, "svg", titled))
    for unwanted in ("metadata", "defs"):  # the first `defs` has styles for every element, of the whole page
        if (element := root.find(f"{{*}}{unwanted}")) is not None:
            root.remove(element)
    referenced = set(re.findall(r'(?:url\(|href=")#([\w-]+)', ElementTree.tostring(root, "unicode")))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        identifier = element.attrib.pop("id", "")
        if identifier in referenced:
            element.set("id", f"{name}-{identifier}")
        if target := element.attrib.pop("{http://www.w3.org/1999/xlink}href", ""):
            element.set("href", f"#{name}-{target[1:]}")
        for key in element.attrib.keys() & {"clip-path", "style"}:
            element.set(key, _in_page(element.attrib[key], name))
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "stroke-linejoin": "round"}
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title", "aria-describedby": f"{name}-desc"}
    described = {
        "title": ", ".join(panel.title for panel in panels),
        "desc": ". ".join(panel.description for panel in panels),
    }
    for place, (tag, text) in enumerate(described.items()):
        element = ElementTree.Element(tag, id=f"{name}-{tag}")
        element.text = drawable(text)
        root.insert(place, element)
    return ElementTree.tostring(root, "unicode")


def _in_page(style: str, name: str) -> str:
    """Adapt a style to a page: its colours and font, ids that begin with the chart's name."""
    style = re.sub(r"font-family: [^;]*; ", "", style.replace("url(#", f"url(#{name}-"))
    return re.sub(r"(?<!\()#[0-9a-f]{6}\b", lambda color: f"var({THEME[color[0]]}, {color[0]})", style)


def digits(value: float) -> str:
    """Write a number to three digits, and never as 1e+03."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def count_text(value: float) -> str:
    """Write a number on an axis, in thousands (k) or millions (M) from 10 000 on."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:g}\N{NARROW NO-BREAK SPACE}{unit}"
    return f"{value:g}"


def power_of_ten(value: float) -> str:
    """Write a power of ten as such, between 0.01 and 1000 as a number."""
    exponent = round(math.log10(value))
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:g}" if -2 <= exponent <= 3 else f"10{raised}"


def _number_logarithmic(axis: "Axis") -> None:
    """Number a logarithmic axis: powers of ten, or round numbers within one."""
    from matplotlib.ticker import AutoLocator, NullFormatter, NullLocator, ScalarFormatter

    low, high = axis.get_view_interval()
    if high < 10 * low:
        axis.set_major_locator(AutoLocator())
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(ScalarFormatter())
    else:
        axis.set_major_formatter(lambda value, _: power_of_ten(value))
        axis.set_minor_formatter(NullFormatter())


def drawable(text: str) -> str:
    """Put a text on one line, without the characters that XML cannot hold."""
    return re.sub(r"[\0-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", " ".join(text.split()))


def shortened(text: str, columns: int) -> str:
    """Cut the middle out of a text that takes more columns; wide characters take two."""
    text = drawable(text)
    columns = max(columns, 8) - sum(east_asian_width(character) in "FW" for character in text)
    return text if len(text) <= columns else f"{text[: max(columns, 8) // 2 - 1]}…{text[-max(columns, 8) // 2 :]}"


def _rendered(panels: Sequence[Bars | Lines], width: float, kind: str, titled: bool = True) -> bytes:
    """Draw panels on a figure of their own: no global state, no window."""
    import matplotlib
    from matplotlib.figure import Figure

    heights = [panel.height(width) + TITLE * titled for panel in panels]
    written = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever style the caller or a matplotlibrc has set
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # browsers have others
        figure = Figure((width, sum(heights)), dpi=DPI, layout="constrained")
        grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
        for panel, axes in zip(panels, grid[:, 0], strict=True):
            panel.draw(axes, width)
            if titled:
                over_legend = 14 * _legend_rows(panel.legend, width)  # points
                axes.set_title(shortened(panel.title, int(width / LETTER) - 8), pad=6 + over_legend)
        if kind == "svg":
            figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        else:
            figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def _legend_rows(labels: Sequence[str], width: float) -> int:
    """Count the lines of a legend, which a single label does without."""
    return 0 if len(labels) < 2 else math.ceil(len(labels) / _legend_columns(labels, width))


def _legend_columns(labels: Sequence[str], width: float) -> int:
    return min(len(labels), max(1, int(width / LETTER / (max(map(len, labels)) + 6))))


def _add_legend(axes: "Axes", handles: Sequence[Any], labels: Sequence[str], width: float) -> None:
    """Name the colours above the panel, where there are several."""
    if not _legend_rows(labels, width):
        return
    legend = axes.legend(
        handles,
        list(map(str, range(len(labels)))),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=_legend_columns(labels, width),
        borderaxespad=0,
        borderpad=0.2,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(shortened(label, int(width / LETTER) - 10))  # not before: matplotlib leaves out names like _x
