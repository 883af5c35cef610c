"""Squares of any image, made as ADM made its reference images."""

import numpy as np
import pytest
from PIL import Image

from varcli.images.decode import center_crop


def gradient(width, height):
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 0 * down], -1).round().astype(np.uint8))


def test_image_of_the_size_is_left_as_it_is():
    image = gradient(64, 64)
    assert np.array_equal(center_crop(image, 64), np.asarray(image))


@pytest.mark.parametrize("size", [(64, 64), (65, 40), (3, 50), (500, 30), (1, 1), (129, 128), (31, 1000)])
def test_square_of_any_image(size):
    cut = center_crop(Image.new("RGB", size, "white"), 32)
    assert cut.shape == (32, 32, 3)
    assert cut.dtype == np.uint8
    assert cut.min() == 255


def test_twice_the_size_is_the_mean_of_four():
    pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8)
    means = pixels.reshape(8, 2, 8, 2, 3).astype(float).mean((1, 3))
    assert np.abs(center_crop(Image.fromarray(pixels), 8) - means).max() <= 1  # Pillow rounds twice


def test_four_times_the_size_is_the_mean_of_sixteen_by_two_steps():
    pixels = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    means = pixels.reshape(8, 4, 8, 4, 3).astype(float).mean((1, 3))
    assert np.abs(center_crop(Image.fromarray(pixels), 8) - means).max() <= 2


def test_below_twice_the_size_pillow_filters_without_aliasing():
    image = Image.effect_noise((60, 60), 90).convert("RGB")
    expected = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC))
    assert np.array_equal(center_crop(image, 40), expected)
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8)[None, :, None], (60, 30, 3)))
    assert np.ptp(center_crop(stripes, 31)[:, 3:-3].astype(int)) < 100


def test_it_is_the_middle():
    wide = center_crop(gradient(200, 100), 50)
    assert np.allclose(wide[25, :, 0], np.linspace(255 / 4, 255 * 3 / 4, 50), atol=2.5)
    assert np.allclose(wide[:, 25, 1], np.linspace(0, 255, 50), atol=2.5)
    high = center_crop(gradient(100, 200), 50)
    assert np.array_equal(high[:, :, 0], wide.transpose(1, 0, 2)[:, :, 1])


def test_odd_room_leaves_the_larger_half_on_the_right():
    pixels = np.zeros((4, 7, 3), np.uint8)
    pixels[:, :, 0] = range(7)
    assert center_crop(Image.fromarray(pixels), 4)[0, :, 0].tolist() == [1, 2, 3, 4]


def test_halving_drops_the_odd_last_row_and_column_as_the_source_does():
    image = Image.effect_noise((17, 19), 90).convert("RGB")
    half = image.resize((8, 9), Image.Resampling.BOX)
    assert np.array_equal(center_crop(image, 8), center_crop(half, 8))
