"""Squares that go through the model: each hole has its own, or overlapping ones from the known outwards."""

from time import process_time

import numpy as np
import pytest

from varcli.images.masks import box_mask
from varcli.images.tiling import (
    LARGEST,
    enlarged,
    plan_squares,
    plan_whole,
    shrunk,
    shrunk_mask,
)

SIZE = (300, 200)
MODEL = 64


def boxes(size, *found):
    """A mask of several boxes."""
    return np.logical_or.reduce([box_mask(box, size) for box in found])


def squares(plan):
    return [(tile.left, tile.top, tile.side) for wave in plan.waves for tile in wave]


@pytest.mark.parametrize(
    ("holes", "size", "expected"),
    [
        ([(100, 80, 150, 120)], SIZE, [(75, 50, 100)]),  # a hole with its context
        ([(290, 190, 300, 200)], SIZE, [(236, 136, 64)]),  # never below the model's resolution
        ([(40, 40, 56, 56), (1150, 860, 1166, 876)], (1200, 900), [(16, 16, 64), (1126, 836, 64)]),
        ([(100, 100, 140, 140), (1199, 899, 1200, 900)], (1200, 900), [(80, 80, 80), (1136, 836, 64)]),
        ([(100, 80, 105, 85), (110, 90, 115, 95)], SIZE, [(75, 55, 64)]),  # near each other: one square
        ([(5, 5, 15, 15)], (20, 20), [(0, 0, 20)]),  # a small image is enlarged as a whole
    ],
)
def test_each_hole_has_a_square_of_its_size(holes, size, expected):
    assert squares(plan_squares(boxes(size, *holes), MODEL)) == expected


@pytest.mark.parametrize(
    ("holes", "size", "side"),
    [
        ([(0, 600, 1000, 610)], (1000, 1200), MODEL),  # a scratch
        ([(1568, 0, 1600, 1200)], (1600, 1200), 96),  # a margin
        ([(100, 100, 1500, 1100)], (1600, 1200), LARGEST * MODEL),
        ([(0, 0, 1000, 1)], (1000, 1), 64),
        ([(0, 0, 500, 30)], (1000, 40), 64),
    ],
)
def test_long_and_large_holes_take_several_squares(holes, size, side):
    plan = plan_squares(boxes(size, *holes), MODEL)
    assert {tile.side for wave in plan.waves for tile in wave} == {side}
    assert plan.count > 4


def test_what_is_asked_to_fade_has_room():
    [(_, _, side)] = squares(plan_squares(box_mask((100, 80, 120, 100), SIZE), MODEL, feather=40))
    assert side == 20 + 2 * 40


def test_fifty_holes_take_few_batches():
    holes = [(100 * i, 100 * j, 100 * i + 5, 100 * j + 5) for i in range(10) for j in range(5)]
    plan = plan_squares(boxes((1000, 500), *holes), MODEL)
    assert [len(wave) for wave in plan.waves] == [50]


def random_mask(noise, shape):
    """Specks, boxes, noise or lines."""
    height, width = shape
    mask = noise.rand(height, width) < noise.choice([0, 0.001, 0.02, 0.5])
    for _ in range(noise.randint(1, 5)):
        top, left = noise.randint(height), noise.randint(width)
        mask[top : top + noise.randint(1, height + 1), left : left + noise.randint(1, width + 1)] = True
    return mask


@pytest.mark.parametrize("seed", range(40))
def test_every_hole_is_covered_by_what_knows_something(seed):
    noise = np.random.RandomState(seed)
    mask = random_mask(noise, noise.randint(1, 301, 2))
    plan = plan_squares(mask, MODEL)
    unknown, shown = plan.padded(mask), np.pad(mask, plan.padding)
    for wave in plan.waves:
        taken = np.zeros_like(unknown)
        for tile in wave:
            assert 0 <= tile.top <= unknown.shape[0] - tile.side and 0 <= tile.left <= unknown.shape[1] - tile.side
            assert not taken[tile.slices].any(), "squares of one wave overlap"
            taken[tile.slices] = True
            filled = plan.fills(tile) & shown[tile.slices]
            assert filled.any(), "a square with nothing to fill"
            shown[tile.slices] &= ~filled
    assert not shown.any()
    assert np.array_equal(plan.cropped(plan.padded(mask)), mask)


def test_planning_is_linear():
    """With thousands of holes, and with a margin that takes thousands of squares."""
    holes = np.zeros((1600, 1600), bool)
    holes[::40, ::40] = True
    margin = np.zeros((70, 100_000), bool)
    margin[:, 70:] = True
    start = process_time()
    assert plan_squares(holes, 64).count == 1600
    assert plan_squares(margin, 64).count > 2000
    assert process_time() - start < 10  # one second, alone on a machine


def test_the_released_rule_has_squares_of_the_shorter_side():
    assert squares(plan_whole(box_mask((0, 0, 9, 9), (64, 64)))) == [(0, 0, 64)]
    plan = plan_whole(~box_mask((384, 0, 640, 256), (1024, 256)))
    assert {tile.side for [tile] in plan.waves} == {256}


@pytest.mark.parametrize("box", [(100, 0, 300, 200), (0, 0, 299, 200), (20, 20, 280, 180)])
@pytest.mark.parametrize("outside", [False, True])
def test_several_cover_everything_and_know_something(box, outside):
    unknown = box_mask(box, SIZE) ^ outside
    for wave in plan_squares(unknown, MODEL).waves:
        for tile in wave:
            assert unknown[tile.slices].any() and not unknown[tile.slices].all()
            unknown[tile.slices] = False
    assert not unknown.any()


def test_a_panorama_grows_outwards_in_overlapping_steps():
    plan = plan_squares(~box_mask((384, 0, 640, 256), (1024, 256)), 64)
    assert {tile.side for wave in plan.waves for tile in wave} == {256}
    lefts = [[tile.left for tile in wave] for wave in plan.waves]
    assert lefts == [[256, 512], [128, 640], [0, 768]]


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
