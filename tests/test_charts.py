"""Charts show what they are given, at a known size, and need no display."""

import io
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from PIL import Image

from varcli.charts import COLOURS, Bars, Lines, digits, png, svg

BARS = Bars(
    title="Where the time goes",
    unit="milliseconds",
    labels=["scale 1", "scale 2", "decoder"],
    parts={"transformer": [3, 6, 0], "drawing": [1, 2, 0], "decoder": [0, 0, 5]},
)
LINES = Lines(
    title="Loss", x_unit="images", y_unit="nats", curves={"training": [(0, 9), (10, 5)], "validation": [(5, 7)]}
)


def rectangles(text):
    """Return colour, left edge and width of each coloured path of an SVG, in points."""
    found = []
    for path in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}path"):
        style = path.get("style", "")
        colour = next((c for c in COLOURS if f"fill: {c.lower()}" in style), None)
        xs = [float(word) for word in path.get("d").split()[1::3]] if colour else []
        if xs:
            found.append((colour, min(xs), max(xs) - min(xs)))
    return found


def test_bars_are_as_long_as_their_numbers_and_side_by_side():
    drawn = [bar for bar in rectangles(svg(BARS)) if bar[2] > 0]
    lengths = {colour: [width for c, _, width in drawn if c == colour] for colour in COLOURS[:3]}
    unit = lengths[COLOURS[1]][0]
    assert lengths[COLOURS[0]][:2] == pytest.approx([3 * unit, 6 * unit], rel=1e-3)
    assert lengths[COLOURS[1]][:2] == pytest.approx([unit, 2 * unit], rel=1e-3)
    first, second = (next(bar for bar in drawn if bar[0] == colour) for colour in COLOURS[:2])
    assert first[1] + first[2] == pytest.approx(second[1], rel=1e-3)


def test_svg_holds_its_words_as_text_and_nothing_before_the_element():
    text = svg(BARS, LINES)
    assert text.startswith("<svg")
    for word in ("Where the time goes", "milliseconds", "scale 2", "drawing", "Loss", "nats", "validation"):
        assert f">{word}</text>" in text
    assert svg(BARS, LINES) == text


@pytest.mark.parametrize("panels", [[BARS], [LINES], [BARS, LINES]])
def test_png_is_960_wide_and_as_high_as_its_panels(panels):
    image = Image.open(io.BytesIO(png(*panels)))
    assert image.size[0] == 960
    assert image.size[1] == pytest.approx(120 * sum(panel.height for panel in panels), abs=1)
    colours = {tuple(int(code[i : i + 2], 16) for i in (1, 3, 5)) for code in COLOURS[:2]}
    assert colours <= {rgb for _, rgb in image.convert("RGB").getcolors(1 << 20)}


def test_one_part_needs_no_legend_and_notes_replace_lengths():
    text = svg(Bars(title="Speed", unit="s", labels=["a", "b"], parts={"only": [1, 2]}, notes=["fast", "slow"]))
    assert ">only</text>" not in text
    assert ">fast</text>" in text and ">2</text>" not in text.split("slow")[1]


def test_numbers_are_three_digits_without_exponents():
    assert [digits(value) for value in (0, 0.01234, 12.34, 999.4, 999.6, 5914.3, 165300)] == [
        "0",
        "0.0123",
        "12.3",
        "999",
        "1000",
        "5914",
        "165300",
    ]


def test_what_has_no_numbers_is_drawn_too():
    assert png(Bars(title="Nothing", unit="s", labels=["a"], parts={"zero": [0]}))
    assert png(Lines(title="Nothing", x_unit="x", y_unit="y", curves={}))


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, varcli.charts; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
