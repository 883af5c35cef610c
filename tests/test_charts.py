"""Charts show what they are given, at a known size, and need no display."""

import io
import random
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import pytest
from PIL import Image

from varcli import charts
from varcli.charts import COLORS, Bars, Curve, Lines, count_text, digits, png, power_of_ten, shortened, svg

BARS = Bars(
    title="Where the time goes",
    unit="milliseconds",
    labels=["scale 1", "scale 2", "decoder"],
    parts={"transformer": [3, 6, 0], "token sampling": [1, 2, 0], "decoder": [0, 0, 5]},
)
LINES = Lines(
    title="Loss",
    x_unit="images",
    y_unit="nats",
    curves=[
        Curve(label="training", points=[(0, 9), (10, 5)], color=0),
        Curve(label="validation", points=[(5, 7)], color=1),
    ],
)


def drawn(points, **settings):
    return svg(Lines(title="t", x_unit="x", curves=[Curve(label="a", points=points, color=0)], **settings), name="c")


def coordinates(text, color, kind="fill"):
    """Return the points of each path of an SVG that has a colour, across and down."""
    paths = [path for path in ElementTree.fromstring(text).iter() if path.tag.endswith("path")]
    colored = [path for path in paths if f"{kind}: var({charts.THEME[color]}, {color})" in path.get("style", "")]
    return [[tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))] for path in colored]


def rectangles(text, color):
    """Return left edge and width of each rectangle of a colour."""
    edges = [[x for x, _ in points] for points in coordinates(text, color)]
    return [(min(xs), max(xs) - min(xs)) for xs in edges if max(xs) > min(xs)]


def test_bars_are_as_long_as_their_numbers_and_side_by_side():
    (transformer, drawing, _) = (rectangles(svg(BARS, name="c"), color) for color in COLORS[:3])
    unit = drawing[0][1]
    assert [width for _, width in transformer[:2]] == pytest.approx([3 * unit, 6 * unit], rel=1e-3)
    assert drawing[1][1] == pytest.approx(2 * unit, rel=1e-3)
    assert transformer[1][0] + transformer[1][1] == pytest.approx(drawing[1][0], rel=1e-3)


def test_marks_of_bars_are_on_the_scale_of_the_bars():
    bars = Bars(
        title="FID", unit="", labels=["a"], parts={"": [4]}, targets=[3], rings=[2], bands=[(3, 5)], narrow=True
    )
    text = svg(bars, name="c", width=4)
    ((left, length),) = rectangles(text, COLORS[0])
    ((from_, extent),) = rectangles(text, charts.BAND)
    ((target, _), _) = coordinates(text, charts.INK, "stroke")[0]
    assert (from_ - left, extent) == pytest.approx((3 / 4 * length, 2 / 4 * length), rel=1e-3)
    assert target - left == pytest.approx(3 / 4 * length, rel=1e-3)


def test_curves_go_through_their_points():
    (curve,) = coordinates(drawn([(0, 0), (1, 2), (3, 6)], y_limits=(0, 6)), COLORS[0], "stroke")
    (x0, y0), *_, (x1, y1) = curve
    assert all((y - y0) / (y1 - y0) == pytest.approx((x - x0) / (x1 - x0), abs=1e-3) for x, y in curve)
    assert y1 < y0, "what is higher is nearer to the top, where SVG counts from"


def test_power_laws_are_lines_on_logarithmic_axes():
    points = [(10**x, 1000 / 10 ** (x / 2)) for x in (3, 4, 7)]
    (curve,) = coordinates(drawn(points, x_log=True, y_log=True), COLORS[0], "stroke")
    (x0, y0), (x, y), (x1, y1) = curve[0], *(point for point in curve[1:] if point != curve[-1]), curve[-1]
    assert (y - y0) / (y1 - y0) == pytest.approx((x - x0) / (x1 - x0), abs=1e-3)
    assert ">10⁷</text>" in drawn(points, x_log=True)


def test_more_curves_than_colours_are_all_drawn():
    curves = [Curve(label=f"curve {i}", points=[(0, i), (1, i)], color=i) for i in range(14)]
    text = svg(Lines(title="Many", x_unit="x", curves=curves), name="c")
    assert all(f">curve {i}</text>" in text for i in range(14))
    assert sum(len(coordinates(text, color, "stroke")) for color in COLORS) >= 14


def test_svg_holds_its_words_as_text_and_nothing_before_the_element():
    text = svg(BARS, LINES, name="c")
    assert text.startswith("<svg")
    for word in ("Where the time goes", "milliseconds", "scale 2", "token sampling", "Loss", "nats", "validation"):
        assert f">{word}</text>" in text
    assert svg(BARS, LINES, name="c") == text


def test_svg_names_and_describes_itself():
    root = ElementTree.fromstring(svg(BARS, LINES, name="c"))
    words = {element.get("id"): element.text for element in root if element.get("id")}
    assert root.get("role") == "img"
    assert words[root.get("aria-labelledby")] == "Where the time goes, Loss"
    assert words[root.get("aria-describedby")] == (
        "Where the time goes: scale 1 4; scale 2 8; decoder 5. Loss: training from 9 to 5; validation from 7 to 7"
    )


def test_svg_changes_nothing_else_on_its_page():
    text = svg(BARS, LINES, name="c7")
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert "<style" not in text and "<metadata" not in text and "font-family" not in text
    assert len(set(ids)) == len(ids) > 2 and all(each.startswith("c7-") for each in ids)
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', text)) <= set(ids)


def test_every_colour_of_an_svg_is_one_that_the_page_may_replace():
    text = svg(BARS, LINES, name="c")
    assert set(re.findall(r"#[0-9a-f]{6}", text)) <= charts.THEME.keys()
    assert not re.search(r": #", text)


@pytest.mark.parametrize("name", ["<b>&\"'", "$x_1$", "_hidden", "日本 é", "\0\x1b\ud800\n\u2028"])
def test_names_are_drawn_as_they_are(name):
    curves = [Curve(label=label, points=[(0, 1)], color=0) for label in (name, "other")]
    bars = Bars(title=name, unit="x", labels=[name], parts={"part": [1], name: [2]})
    root = ElementTree.fromstring(svg(bars, Lines(title=name, x_unit="x", curves=curves), name="c"))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert texts.count(charts.drawable(name)) >= 4 and "other" in texts


@pytest.mark.parametrize("panels", [[BARS], [LINES], [BARS, LINES]])
def test_png_is_960_wide_and_as_high_as_its_panels(panels):
    image = Image.open(io.BytesIO(png(*panels)))
    assert image.size[0] == 960
    assert image.size[1] == pytest.approx(
        120 * sum(panel.height(charts.WIDTH) + charts.TITLE for panel in panels), abs=1
    )
    colors = {tuple(int(code[i : i + 2], 16) for i in (1, 3, 5)) for code in COLORS[:2]}
    assert colors <= {rgb for _, rgb in image.convert("RGB").getcolors(1 << 20)}


def test_one_part_needs_no_legend_and_notes_replace_lengths():
    bars = Bars(title="Speed", unit="s", labels=["a", "b"], parts={"only": [1, 2]}, notes=["fast", "slow"])
    text = svg(bars, name="c")
    assert ">only</text>" not in text
    assert ">fast</text>" in text and ">2</text>" not in text.split("slow")[1]


@pytest.mark.parametrize(
    ("write", "texts"),
    [
        (
            digits,
            {0: "0", 0.01234: "0.0123", 12.34: "12.3", 999.4: "999", 999.6: "1000", 5914.3: "5914", 165300: "165300"},
        ),
        (count_text, {0: "0", 2500: "2500", 10_000: "10\u202fk", 250_000: "250\u202fk", 1_500_000: "1.5\u202fM"}),
        (power_of_ten, {1: "1", 0.01: "0.01", 1000: "1000", 1e-3: "10⁻³", 1e21: "10²¹"}),
    ],
)
def test_numbers_are_written_without_exponents_such_as_1e_plus_03(write, texts):
    assert {value: write(value) for value in texts} == texts


def test_long_names_keep_both_ends():
    name = 500 * "x"
    bars = Bars(title=name, unit="x", labels=[name], parts={"part": [1], name: [2]}, narrow=True)
    assert f">{25 * 'x'}" not in svg(bars, name="c", width=4).partition("</desc>")[2]
    assert shortened("a/long/name/of/a/checkpoint.safetensors", 20) == "a/long/na…afetensors"
    assert shortened("short\nname", 20) == "short name"


@pytest.mark.parametrize("seed", range(10))
def test_numbers_of_any_size_can_be_drawn(seed):
    draws = random.Random(seed)
    size, offset = 10 ** draws.uniform(-9, 9), draws.choice([0, 1, -3, 1e4])
    values = [offset + draws.uniform(-1, 1) * size for _ in range(draws.choice([1, 2, 9]))]
    assert "<svg" in drawn(list(enumerate(values)))


@pytest.mark.slow
@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [-2.0, -2.0], [5e-324], [1e15, -1e15], [7, 7 + 1e-12]])
def test_numbers_that_hardly_differ_can_be_drawn(values):
    bars = Bars(title="t", unit="x", labels=["a"] * len(values), parts={"x": values}, narrow=True)
    assert "<svg" in drawn(list(enumerate(values))) and "<svg" in drawn([(x, 0) for x in values])
    assert "<svg" in svg(bars, name="c", width=4)


def test_what_has_no_numbers_is_drawn_too():
    assert png(Bars(title="Nothing", unit="s", labels=["a"], parts={"zero": [0]}))
    assert png(Bars(title="Nothing", unit="s", labels=[], parts={"zero": []}))
    assert png(Lines(title="Nothing", x_unit="x", y_unit="y", curves=[]))


def test_charts_and_the_styles_of_others_leave_each_other_alone():
    before = png(BARS)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        kept = dict(matplotlib.rcParams)
        assert png(BARS) == before
        assert dict(matplotlib.rcParams) == kept


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, varcli.charts; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
