"""Squares that go through the model: one where it fits, else overlapping ones from the known outwards."""

import numpy as np
import pytest

from varcli.images.masks import box_mask
from varcli.images.tiling import bounds, count_tiles, enlarged, shrunk, shrunk_mask, tile_side, tiles

SIZE = (300, 200)
MODEL = 64


def test_one_square_around_a_hole():
    marks = box_mask((100, 80, 150, 120), SIZE)
    side = tile_side(marks, MODEL)
    assert side == 100
    [region] = tiles(marks, side)
    assert (region.left, region.top, region.side) == (75, 50, 100)
    assert bounds(marks) == (100, 80, 150, 120)


def test_squares_stay_in_the_image_and_at_the_models_resolution():
    corner = box_mask((290, 190, 300, 200), SIZE)
    [region] = tiles(corner, tile_side(corner, MODEL))
    assert (region.left, region.top, region.side) == (236, 136, 64)
    assert tile_side(box_mask((0, 0, 3, 3), (30, 20)), MODEL) == 20
    assert tile_side(box_mask((10, 10, 290, 190), SIZE), MODEL) == 200


@pytest.mark.parametrize("box", [(100, 0, 300, 200), (0, 0, 299, 200), (20, 20, 280, 180)])
@pytest.mark.parametrize("outside", [False, True])
def test_several_cover_everything_and_know_something(box, outside):
    marks = box_mask(box, SIZE) ^ outside
    side = tile_side(marks, MODEL, 200 if outside else None)
    unknown = marks.copy()
    found = list(tiles(marks, side))
    assert len(found) == count_tiles(marks, side)
    for region in found:
        assert 0 <= region.left <= SIZE[0] - side and 0 <= region.top <= SIZE[1] - side
        assert unknown[region.slices].any() and not unknown[region.slices].all()
        unknown[region.slices] = False
    assert not unknown.any()


def test_a_panorama_grows_outwards_in_overlapping_steps():
    marks = ~box_mask((384, 0, 640, 256), (1024, 256))
    lefts = [region.left for region in tiles(marks, tile_side(marks, 64, 256))]
    assert sorted(lefts) == [0, 128, 256, 512, 640, 768]
    assert all(
        abs(left - 384) <= 128 or any(abs(left - other) == 128 for other in lefts[:i]) for i, left in enumerate(lefts)
    )


def test_there_and_back():
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    assert enlarged(noise, 64) is noise and shrunk(noise.astype(np.float32), 64).dtype == np.float32
    assert shrunk(noise.astype(np.float32), 16).shape == (16, 16, 3)
    assert enlarged(noise, 100).shape == (100, 100, 3)
    flat = np.full((50, 50, 3), 99, np.float32)
    assert np.allclose(shrunk(flat, 16), 99, atol=0.01)


def test_no_marked_pixel_is_lost():
    for at in ((0, 0), (31, 40), (99, 99)):
        marks = np.zeros((100, 100), bool)
        marks[at] = True
        small = shrunk_mask(marks, 64)
        assert small.any() and small[at[0] * 64 // 100, at[1] * 64 // 100]
        assert shrunk_mask(marks, 100) is marks
