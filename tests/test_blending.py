"""Soft edges that end where they say, levels that match, and what stands in for the unknown."""

import numpy as np
import pytest

from varcli.images.blending import feather_mask, match_levels, pull_push_fill
from varcli.images.masks import box_mask

SIZE = (100, 50)


@pytest.mark.parametrize("feather", [0, 1, 2, 3, 7, 8])
def test_a_feather_ends_where_it_says(feather):
    marks = box_mask((20, 15, 30, 25), SIZE)
    share = feather_mask(marks, feather)
    assert (share[marks] == 1).all()
    rows, columns = np.indices(marks.shape)
    away = np.maximum(np.maximum(20 - columns, columns - 29), np.maximum(15 - rows, rows - 24))
    assert (share[away > feather] == 0).all()
    assert (share[(away > 0) & (away <= feather)] > 0).all()
    beside = share[20, 29 : 31 + feather]
    assert (np.diff(beside) <= 0).all() and beside[-1] == 0


def test_what_stands_in_knows_the_known_alone():
    noise = np.random.RandomState(0)
    for shape in ((1, 7), (13, 9), (16, 16)):
        pixels = noise.rand(*shape, 3).astype(np.float32) * 255
        known = noise.rand(*shape) < 0.4
        known[0, 0] = True
        other = np.where(known[:, :, None], pixels, 1e6).astype(np.float32)
        filled = pull_push_fill(pixels, known)
        assert np.array_equal(filled, pull_push_fill(other, known))
        assert np.array_equal(filled[known], pixels[known])
        assert filled.min() >= pixels[known].min() - 0.01 and filled.max() <= pixels[known].max() + 0.01
    flat = np.full((8, 8, 3), 40, np.float32)
    assert np.allclose(pull_push_fill(flat, known[:8, :8] | np.eye(8, dtype=bool)), 40)
    assert (pull_push_fill(flat, np.zeros((8, 8), bool)) == 127.5).all()


@pytest.mark.parametrize("side", [64, 50, 7])
def test_levels_match_around_a_hole(side):
    given = np.full((side, side, 3), 200, np.uint8)
    made = np.full((side, side, 3), 90, np.uint8)
    made[:, :, 1] = 200
    hole = box_mask((side // 2, 0, side, side), (side, side))
    out = match_levels(given, made, hole, 8).astype(int)
    assert (abs(out[:, : side // 2] - 200) <= 20).all()
    assert (out[:, :, 1] == 200).all()
    assert out[side // 2, -1, 0] <= out[side // 2, side // 2, 0]
    given[hole] = 7
    assert np.array_equal(match_levels(given, made, hole, 8), out)


def test_levels_that_match_stay():
    noise = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    hole = box_mask((0, 0, 9, 9), (32, 32))
    assert np.array_equal(match_levels(noise, noise, hole, 8), noise)
    assert np.array_equal(match_levels(noise, noise, np.ones((32, 32), bool), 8), noise)
