"""Masks, boxes and margins as users give them."""

import numpy as np
import pytest

from varcli.errors import InputError, UsageError
from varcli.images.editable import SourceImage
from varcli.images.masks import (
    box_mask,
    check_mask,
    check_mask_image,
    fitted_mask,
    grey_mask,
    parse_box,
    parse_margins,
    parse_target,
    transparent_mask,
)

SIZE = (100, 50)


def given(pixels):
    levels = np.asarray(pixels)
    return SourceImage("mask.png", levels if levels.ndim == 3 else levels[:, :, None], "")


def test_white_is_what_to_fill():
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    marks = [[False, False, True, True]]
    assert grey_mask(given(grey)).tolist() == marks
    assert grey_mask(given(np.dstack([grey] * 3))).tolist() == marks
    assert grey_mask(given(grey.astype(np.uint16) * 257)).tolist() == marks
    white_on_nothing = np.dstack([np.full_like(grey, 255)] * 3 + [grey])
    assert grey_mask(given(white_on_nothing)).tolist() == marks
    assert grey_mask(given(white_on_nothing.astype(np.uint16) * 257)).tolist() == marks


def test_transparent_is_what_to_fill_with_alpha():
    layer = np.full((1, 3, 4), 255, np.uint8)
    layer[0, :, 3] = (0, 127, 128)
    assert transparent_mask(given(layer)).tolist() == [[True, True, False]]
    with pytest.raises(InputError, match=r"^--alpha needs an image with an alpha channel; mask.png has none"):
        transparent_mask(given(layer[:, :, :3]))


def speckled(side, colours):
    return np.random.RandomState(0).choice(colours, (side, side, 1)).astype(np.uint8)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (speckled(20, [0, 255]), ""),
        (speckled(20, [1, 254]), ""),
        (speckled(20, [1, 254]).astype(np.uint16) * 257, ""),
        (np.dstack([speckled(20, [0, 255])] * 3), ""),
        (np.dstack([np.full((20, 20), 255, np.uint8), speckled(20, [0, 0, 255])[:, :, 0]]), ""),  # white on nothing
        (speckled(20, range(256)), "mask.png does not look like a mask: its brightness marks 46% of the image"),
        (
            np.dstack([np.full((20, 20), 255, np.uint8), speckled(20, [0, 255, 255, 255])[:, :, 0]]),
            "of the image; --alpha fills where it is transparent",
        ),
    ],
)
def test_what_is_hardly_a_mask_is_said(levels, message):
    image = given(levels)
    said = check_mask_image(image, grey_mask(image))
    assert message in said and bool(message) == bool(said)


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_are_no_mask(alpha):
    noise = np.random.RandomState(0).randint(0, 256, (20, 20, 4)).astype(np.uint8)
    image = given(noise[:, :, : 4 if alpha else 3])
    advice = "; --alpha fills where it is transparent" if alpha else ""
    with pytest.raises(InputError, match=rf"^the mask mask.png has colours: .* white where to fill{advice}$"):
        check_mask_image(image, grey_mask(image))


def test_boxes_and_margins():
    assert parse_box("10,5,40,50", SIZE) == (10, 5, 40, 50)
    assert parse_box("10%, 10%,50%,100%", SIZE) == (10, 5, 50, 50)
    assert parse_box("10,0,12.5%,1", SIZE) == (10, 0, 12, 1)
    assert parse_margins("16,0,10%,50%", SIZE) == (16, 0, 10, 25)
    assert parse_target("103x52", SIZE) == (1, 1, 2, 1)
    assert parse_target("200×50", SIZE) == (50, 0, 50, 0)
    marks = box_mask((10, 5, 40, 50), SIZE)
    assert marks.shape == (50, 100) and marks[5:, 10:40].all() and marks.sum() == 45 * 30


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (
            parse_box,
            "1,2,3",
            "--box must be left,top,right,bottom in pixels or percent, such as 16,0",
        ),
        (parse_box, "1,2,3,x", "--box must be left,top"),
        (parse_box, "nan%,2,3,4", "--box must be left,top"),
        (parse_box, "inf%,2,3,4", "--box must be left,top"),
        (parse_box, "5,0,5,9", "--box must be left,top,right,bottom with left < right and top < bottom (got 5,0,5,9)"),
        (parse_box, "0,0,101,9", "--box must lie within the image of 100 × 50 pixels (got 0,0,101,9)"),
        (parse_box, "-1,0,9,9", "--box must lie within the image of 100 × 50 pixels"),
        (parse_box, "0,0,100%,50", "--box 0,0,100%,50 is the whole image"),
        (parse_margins, "0,0,0,0", "--pad must be 0 or more on each side, and more than 0 on one (got 0,0,0,0)"),
        (parse_margins, "-1,0,2,0", "--pad must be 0 or more"),
        (parse_margins, "0,0,0,99999999", "--pad 0,0,0,99999999 makes 100 × 100000049 pixels, and memory suffices for"),
        (parse_target, "200", "--to must be width x height in pixels, such as 1024x256 (got 200)"),
        (parse_target, "200x40", "--to must be larger than the image's 100x50 (got 200x40)"),
        (parse_target, "100x50", "--to must be larger than"),
        (parse_target, "99999x99999", "--to 99999x99999 makes 99999 × 99999 pixels, and memory"),
    ],
)
def test_mistakes(parse, text, message):
    with pytest.raises(UsageError) as caught:
        parse(text, SIZE)
    assert str(caught.value).startswith(message)


def test_masks_of_another_size():
    marks = box_mask((0, 0, 5, 5), (10, 10))
    assert fitted_mask(marks, (10, 10), "m.png", fit=False) is marks
    with pytest.raises(InputError, match=r"must be of the image.s size, 100 × 50 \(m.png is 10 × 10\); --fit-mask"):
        fitted_mask(marks, SIZE, "m.png", fit=False)
    fitted = fitted_mask(marks, SIZE, "m.png", fit=True)
    assert (fitted ^ box_mask((0, 0, 50, 25), SIZE)).sum() < 12  # a rounded corner


def test_empty_and_full_masks():
    for marks, message in ((np.zeros((4, 4), bool), "marks nothing"), (np.ones((4, 4), bool), "marks the whole")):
        with pytest.raises(InputError, match=message):
            check_mask(marks, "m.png")
    check_mask(np.eye(4, dtype=bool), "m.png")
