"""Contact sheets and growing images: everything in its place, captions inside the margins."""

import numpy as np
import pytest
from PIL import Image, ImageFont, ImageSequence

from support.provenances import MADE, image
from varcli.images.contact_sheet import _columns, _wrapped, contact_sheet, save_growth
from varcli.images.provenance import read_provenance

PAPER = 255


def coloured(value, side=64):
    """A square of one colour that is neither paper nor ink."""
    return np.full((side, side, 3), (value, 20, 200), np.uint8)


def places(sheet, colour):
    """Rows and columns of a sheet where a colour stands."""
    rows, columns = np.nonzero((sheet == colour).all(-1))
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def test_images_stand_in_rows_with_even_margins():
    values = [10, 40, 70, 100, 130]
    sheet = contact_sheet([coloured(v) for v in values], ["a"] * 5, columns=3)
    found = [places(sheet, coloured(v)[0, 0]) for v in values]
    assert {(bottom - top, right - left) for top, bottom, left, right in found} == {(192, 192)}
    lefts, tops = [left for *_, left, _ in found], [top for top, *_ in found]
    gap = lefts[0]
    assert lefts == [gap, 2 * gap + 192, 3 * gap + 384, gap, 2 * gap + 192]
    assert tops[0] == gap
    assert tops[:3] == [gap] * 3
    assert tops[3] == tops[4] > gap + 192
    assert sheet.shape[1] == 4 * gap + 3 * 192
    assert sheet.shape[0] - found[4][1] == tops[3] - found[0][1]  # below the last row as between the rows
    assert sheet.dtype == np.uint8


def test_small_images_are_shown_pixel_by_pixel():
    pixels = image(1, 64, 64)
    sheet = contact_sheet([pixels], [""])
    gap = (sheet.shape[1] - 192) // 2
    assert np.array_equal(sheet[gap : gap + 192 : 3, gap : gap + 192 : 3], pixels)


def test_image_of_256_stays_as_it_is_and_larger_ones_shrink_to_it():
    pixels = image(1, 256, 256)
    sheet = contact_sheet([pixels, coloured(9, 512)], ["", ""])
    assert np.array_equal(sheet[16:272, 16:272], pixels)
    assert places(sheet, coloured(9)[0, 0]) == (16, 272, 288, 544)


def test_smaller_image_stands_in_the_middle_of_its_place():
    sheet = contact_sheet([coloured(9, 200), coloured(99, 256)], ["", ""], columns=2)
    top, bottom, left, right = places(sheet, coloured(9)[0, 0])
    assert (top - 16, 272 - bottom) == (left - 16, 272 - right) == (28, 28)


def test_captions_stay_below_their_image():
    plain = contact_sheet([coloured(9)] * 2, ["", ""])
    labelled = contact_sheet([coloured(9)] * 2, ["207 golden retriever, seed 123456789 and more"] * 2)
    assert labelled.shape[0] > plain.shape[0]
    ink = (labelled < 200).all(-1)
    rows, columns = np.nonzero(ink)
    assert rows.min() > places(labelled, coloured(9)[0, 0])[1]
    assert rows.max() < labelled.shape[0] - 8
    assert columns.min() >= 8
    assert columns.max() < labelled.shape[1] - 8


@pytest.mark.parametrize(
    ("label", "lines"),
    [
        ("", 0),
        ("slug", 1),
        ("207 golden retriever, seed 123456", 2),
        ("one two three four five six seven eight nine ten eleven twelve", 2),
        ("Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch", 1),
    ],
)
def test_label_takes_at_most_two_lines_of_the_width(label, lines):
    font = ImageFont.load_default(14)
    wrapped = _wrapped(label, 192, font)
    assert len(wrapped) == lines
    assert all(font.getlength(line) <= 192 for line in wrapped)
    assert "".join(wrapped).endswith("…") == (" ".join(wrapped) != label)


def test_columns_leave_few_places_empty():
    columns = {count: _columns(count) for count in range(1, 1025)}
    assert [columns[count] for count in (1, 2, 4, 6, 8, 10, 12, 16, 200, 1000)] == [1, 2, 2, 3, 4, 5, 4, 4, 20, 40]
    for count, across in columns.items():
        down = -(-count // across)
        assert down <= across <= 2 * down + 1


def test_strip_shows_every_scale_and_carries_the_provenance(tmp_path):
    values = [10, 40, 70]
    save_growth(tmp_path / "x.png", [coloured(v) for v in values], ["1 × 1", "2 × 2", "3 × 3"], MADE)
    with Image.open(tmp_path / "x.png") as image:
        sheet = np.asarray(image)
    found = [places(sheet, coloured(v)[0, 0]) for v in values]
    assert [left for *_, left, _ in found] == sorted(left for *_, left, _ in found)
    assert {top for top, *_ in found} == {12}
    assert read_provenance(tmp_path / "x.png") == MADE


def test_animation_rests_on_the_finished_image(tmp_path):
    frames = [coloured(v) for v in (10, 40, 70)] + [image(1, 64, 64)]
    save_growth(tmp_path / "x.GIF", frames, [""] * 4)
    with Image.open(tmp_path / "x.GIF") as opened:
        assert opened.n_frames == 4
        assert opened.info["loop"] == 0
        shown = [(frame.info["duration"], np.asarray(frame.convert("RGB"))) for frame in ImageSequence.Iterator(opened)]
    durations = [duration for duration, _ in shown]
    assert durations[-1] > 4 * durations[0]
    assert len(set(durations[:-1])) == 1
    assert np.abs(shown[1][1][::3, ::3].astype(int) - frames[1]).max() <= 4
    assert np.abs(shown[3][1][::3, ::3].astype(int) - frames[3]).mean() < 16
