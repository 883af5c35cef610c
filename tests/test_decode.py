"""Decoding images of every kind, and cropping them to squares."""

import pickle
import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from varcli.images.decode import UnreadableImage, adm_crop, decode_image, square_crop


def encoded(image, kind="PNG", **options):
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


# --- images of every kind ------------------------------------------------------------------------


def corners(image):
    return image.getpixel((0, 0)), image.getpixel((image.width - 1, 0))


def two_tone(mode, left, right):
    image = Image.new(mode, (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    return image


def palette(kind, **options):
    image = two_tone("P", 0, 1)
    image.putpalette([200, 10, 20, 30, 40, 50])
    return encoded(image, kind, **options)


def sixteen_bits():
    values = np.zeros((4, 8), np.uint16)
    values[:, 4:] = 65535
    values[:, :4] = 257 * 100
    return encoded(Image.fromarray(values))


WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize(
    ("content", "left", "right"),
    [
        (encoded(two_tone("RGB", (1, 2, 3), (4, 5, 6))), (1, 2, 3), (4, 5, 6)),
        (encoded(two_tone("L", 7, 8)), (7, 7, 7), (8, 8, 8)),
        (encoded(two_tone("1", 0, 1)), BLACK, WHITE),
        (sixteen_bits(), (100, 100, 100), WHITE),
        (encoded(two_tone("RGBA", (9, 9, 9, 0), (4, 5, 6, 255))), WHITE, (4, 5, 6)),
        (encoded(two_tone("LA", (9, 0), (4, 255))), WHITE, (4, 4, 4)),
        (palette("PNG", transparency=0), WHITE, (30, 40, 50)),
        (palette("GIF"), (200, 10, 20), (30, 40, 50)),
        (encoded(two_tone("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), "TIFF"), WHITE, BLACK),
        (encoded(two_tone("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), "JPEG", quality=100), WHITE, BLACK),
        (encoded(two_tone("F", 12.0, 20.0), "TIFF"), (12, 12, 12), (20, 20, 20)),
        (palette("GIF", save_all=True, append_images=[Image.new("L", (8, 4), 99)]), (200, 10, 20), (30, 40, 50)),
    ],
    ids=["rgb", "grey", "bits", "16 bits", "rgba", "grey alpha", "hole", "gif", "cmyk", "cmyk jpeg", "float", "frames"],
)
def test_every_kind_becomes_rgb(content, left, right):
    image = decode_image(content, "x")
    assert image.mode == "RGB"
    assert image.size == (8, 4)
    assert np.abs(np.subtract(corners(image), (left, right))).max() <= 1


def test_camera_images_stand_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: the first row is the right edge
    content = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert decode_image(content, "x").size == (4, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_spoil_an_image():
    content = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\x01")
    assert decode_image(content, "x").size == (8, 4)


def bomb():
    content = bytearray(encoded(Image.new("L", (8, 8))))
    content[16:24] = struct.pack(">II", 60000, 60000)
    return bytes(content)


PNG = encoded(Image.new("RGB", (64, 64), "red"))
JPEG = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")


@pytest.mark.parametrize(
    "content",
    [b"", b"text", JPEG[:300], JPEG[: len(JPEG) // 2], PNG[:-40], bomb(), b"\x89PNG\r\n\x1a\n" + bytes(50)],
    ids=["empty", "text", "header", "half a jpeg", "cut png", "bomb", "zeros"],
)
def test_unreadable_image_is_named(content):
    with pytest.raises(UnreadableImage, match=r"^cannot read image a/2\.png: \S") as caught:
        decode_image(content, "a/2.png")
    again = pickle.loads(pickle.dumps(caught.value))  # worker processes send it to their parent
    assert (str(again), again.name) == (str(caught.value), "a/2.png")


# --- squares by Lanczos ------------------------------------------------------------------------------


def coordinates(width, height):
    """An image whose red and green are the column and the row."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))


def test_lanczos_leaves_an_image_of_the_right_size_as_it_is():
    image = coordinates(16, 16)
    assert np.array_equal(square_crop(image, 16), np.asarray(image))


@pytest.mark.parametrize(("corner", "left", "top"), [((0, 0), 0, 0), ((1, 1), 10, 4), ((0.5, 0), 5, 0), (None, 5, 2)])
def test_corner_is_a_fraction_of_the_free_space(corner, left, top):
    cut = square_crop(coordinates(26, 20), 16, resize_ratio=20 / 16, corner=corner)
    assert cut.shape == (16, 16, 3)
    assert cut.dtype == np.uint8
    assert tuple(cut[0, 0]) == (left, top, 0)


@pytest.mark.parametrize("size", [(64, 64), (65, 40), (3, 500), (500, 3), (1, 1), (72, 71)])
def test_lanczos_square_of_any_image(size):
    for ratio in (1.0, 1.125):
        for corner in (None, (0.0, 0.0), (1.0, 1.0), (0.3, 0.999)):
            assert square_crop(Image.new("RGB", size, "white"), 64, ratio, corner).min() == 255


def test_shorter_side_decides_the_scale():
    cut = square_crop(coordinates(200, 100), 50)
    assert np.allclose(cut[25, 25, :2], (100, 50), atol=2)
    assert np.allclose(np.diff(cut[25, :, 0].astype(int)), 2, atol=1)


# --- squares as ADM makes them -----------------------------------------------------------------------


def gradient(width, height):
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 0 * down], -1).round().astype(np.uint8))


def test_adm_leaves_an_image_of_the_right_size_as_it_is():
    image = gradient(64, 64)
    assert np.array_equal(adm_crop(image, 64), np.asarray(image))


@pytest.mark.parametrize("size", [(64, 64), (65, 40), (3, 50), (500, 30), (1, 1), (129, 128), (31, 1000)])
def test_adm_square_of_any_image(size):
    cut = adm_crop(Image.new("RGB", size, "white"), 32)
    assert cut.shape == (32, 32, 3)
    assert cut.dtype == np.uint8
    assert cut.min() == 255


def test_twice_the_size_is_the_mean_of_four():
    pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8)
    means = pixels.reshape(8, 2, 8, 2, 3).astype(float).mean((1, 3))
    assert np.abs(adm_crop(Image.fromarray(pixels), 8) - means).max() <= 1  # Pillow rounds twice


def test_four_times_the_size_is_the_mean_of_sixteen_by_two_steps():
    pixels = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    means = pixels.reshape(8, 4, 8, 4, 3).astype(float).mean((1, 3))
    assert np.abs(adm_crop(Image.fromarray(pixels), 8) - means).max() <= 2


def test_below_twice_the_size_pillow_filters_without_aliasing():
    image = Image.effect_noise((60, 60), 90).convert("RGB")
    expected = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC))
    assert np.array_equal(adm_crop(image, 40), expected)
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8)[None, :, None], (60, 30, 3)))
    assert np.ptp(adm_crop(stripes, 31)[:, 3:-3].astype(int)) < 100


def test_adm_takes_the_centre():
    wide = adm_crop(gradient(200, 100), 50)
    assert np.allclose(wide[25, :, 0], np.linspace(255 / 4, 255 * 3 / 4, 50), atol=2.5)
    assert np.allclose(wide[:, 25, 1], np.linspace(0, 255, 50), atol=2.5)
    high = adm_crop(gradient(100, 200), 50)
    assert np.array_equal(high[:, :, 0], wide.transpose(1, 0, 2)[:, :, 1])


def test_adm_leaves_the_larger_half_of_an_odd_rest_on_the_right():
    pixels = np.zeros((4, 7, 3), np.uint8)
    pixels[:, :, 0] = range(7)
    assert adm_crop(Image.fromarray(pixels), 4)[0, :, 0].tolist() == [1, 2, 3, 4]


def test_halving_drops_the_odd_last_row_and_column_as_adm_does():
    image = Image.effect_noise((17, 19), 90).convert("RGB")
    half = image.resize((8, 9), Image.Resampling.BOX)
    assert np.array_equal(adm_crop(image, 8), adm_crop(half, 8))


# --- greys of more than eight bits -------------------------------------------------------------------


def tiff(values):
    content = BytesIO()
    Image.fromarray(values).save(content, "TIFF")
    return content.getvalue()


LEVELS = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    "content",
    [
        tiff((LEVELS / 255).astype(np.float32)),
        tiff(LEVELS.astype(np.float32)),
        tiff(LEVELS.astype(np.int32)),
        tiff((LEVELS * 257).astype(np.int32)),
        tiff((LEVELS * 257).astype(np.uint16)),
        b"P5 16 16 65535\n" + (LEVELS * 257).astype(">u2").tobytes(),
    ],
    ids=["floats to 1", "floats to 255", "integers to 255", "integers to 65535", "16 bits", "PGM"],
)
def test_deep_greys_keep_their_brightness(content):
    assert np.array_equal(np.asarray(decode_image(content, "x"))[..., 0], LEVELS)


def test_dark_sixteen_bits_stay_dark():
    dark = LEVELS // 255
    for content in (tiff((dark * 257).astype(np.uint16)), b"P5 16 16 65535\n" + (dark * 255).astype(">u2").tobytes()):
        assert np.asarray(decode_image(content, "x")).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 256.0, 65535.0, -1, 65536])
def test_greys_of_another_range_are_refused(value):
    kind = np.float32 if isinstance(value, float) else np.int32
    with pytest.raises(UnreadableImage, match=r"its 32-bit values are .* expected integers up to 65535, or floats"):
        decode_image(tiff(np.where(LEVELS == 255, value, 0).astype(kind)), "x")
