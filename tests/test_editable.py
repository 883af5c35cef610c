"""Images of every kind come in right, and go out as they came but where they were changed."""

import os
import struct
from io import BytesIO

import numpy as np
import png
import pytest
from PIL import Image

from varcli.errors import InputError
from varcli.images import decode
from varcli.images.editable import read_source_image, source_image
from varcli.images.provenance import png_bytes, read_provenance

NOWHERE = np.zeros((9, 12), bool)
NOISE = np.random.RandomState(0).randint(0, 256, (9, 12, 4)).astype(np.uint8)
DEEP = np.random.RandomState(1).randint(0, 65536, (9, 12, 4)).astype(np.uint16)


def content(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(image, kind="PNG", **options):
    return source_image(content(image, kind, **options), "it")


def deep_content(levels, **options):
    """Return a PNG of 16 bits, by other hands."""
    file, (height, width, channels) = BytesIO(), levels.shape
    writer = png.Writer(width, height, greyscale=channels < 3, alpha=channels % 2 == 0, bitdepth=16, **options)
    writer.write(file, levels.reshape(height, -1).tolist())
    return file.getvalue()


MODES = {
    "L": Image.fromarray(NOISE[:, :, 0]),
    "LA": Image.fromarray(NOISE[:, :, :2]),
    "RGB": Image.fromarray(NOISE[:, :, :3]),
    "RGBA": Image.fromarray(NOISE),
    "I;16": Image.fromarray(DEEP[:, :, 0]),
}
CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1}


@pytest.mark.parametrize("mode", MODES)
def test_what_does_not_change_stays_to_the_last_bit(mode):
    given = read(MODES[mode])
    pixels = given.paint().copy()
    deep = pixels.dtype == np.uint16
    assert pixels.shape == (9, 12, 3) and deep == (mode == "I;16") and given.pixels().dtype == np.uint8
    changed = np.zeros((9, 12), bool)
    changed[2:4, 5:8] = True
    pixels[changed] = np.multiply((10, 20, 30), 257 if deep else 1)
    content = png_bytes(given.replaced(pixels, NOWHERE))
    with Image.open(BytesIO(content)) as image:
        assert image.mode == mode
    out = source_image(content, "out").levels
    own = np.asarray(MODES[mode]).reshape(9, 12, CHANNELS[mode])
    assert np.array_equal(out[~changed], own[~changed])
    assert out[2, 5].tolist() == {
        "L": [18], "LA": [18, own[2, 5, -1]], "RGB": [10, 20, 30], "RGBA": [10, 20, 30, own[2, 5, -1]],
        "I;16": [4665],
    }[mode]  # fmt: skip


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_stay_to_the_last_bit(channels):
    own = DEEP[:, :, :channels]
    given = source_image(deep_content(own), "deep")
    assert np.array_equal(given.levels, own) and given.levels.dtype == np.uint16 and not given.notes
    pixels = given.paint().copy()
    pixels[2, 5] = (2571, 5142, 7713)
    out = source_image(png_bytes(given.replaced(pixels, NOWHERE)), "out").levels
    expected = own.copy()
    expected[2, 5, : given.colours] = (4666,) if channels == 2 else (2571, 5142, 7713)
    assert np.array_equal(out, expected)


def test_16_bits_look_as_8_do():
    for channels in (1, 2, 3, 4):
        levels = NOISE[:, :, :channels]
        flat = read(Image.fromarray(levels[:, :, 0] if channels == 1 else levels))
        deep = source_image(deep_content(levels.astype(np.uint16) * 257), "deep")
        assert np.abs(deep.pixels().astype(int) - flat.pixels()).max() <= (channels in (2, 4))
        assert np.array_equal(deep.alpha(), flat.alpha())


@pytest.mark.parametrize(
    ("around", "within", "filled"),
    [(255, 0, 255), (255, 99, 255), (128, 0, 128), (128, 255, 128), (0, 0, 255), (1, 0, 1)],
)
@pytest.mark.parametrize("deep", [False, True])
def test_what_is_new_is_as_opaque_as_what_is_seen_around_it(around, within, filled, deep):
    layer, hole = NOISE.copy(), NOWHERE.copy()
    hole[2:6, 3:7] = True
    layer[:, :, 3] = np.where(hole, within, around)
    given = source_image(deep_content(layer.astype(np.uint16) * 257) if deep else content(Image.fromarray(layer)), "it")
    pixels = given.paint().copy()
    pixels[hole] = 200
    out = given.replaced(pixels, hole).levels
    assert (out[hole] == np.array([200 + 0 * deep] * 3 + [filled * (257 if deep else 1)])).all()
    assert np.array_equal(out[~hole], given.levels[~hole])


def test_colours_are_edited_without_their_opacity():
    """Mixed with white and then shown half transparent again they would come out pale."""
    layer = np.full((9, 12, 4), (200, 40, 40, 128), np.uint8)
    assert (read(Image.fromarray(layer)).paint() == (200, 40, 40)).all()
    layer[:, :, 3] = 0
    assert (read(Image.fromarray(layer)).paint() == 255).all()


@pytest.mark.parametrize(("mode", "key", "colour"), [("RGB", (255, 0, 255), (30, 120, 200)), ("L", 0, 90)])
def test_a_transparent_colour_becomes_an_alpha_channel(mode, key, colour):
    image = Image.new(mode, (12, 9), key)
    image.paste(colour, (4, 3, 8, 6))
    given = read(image, transparency=key)
    assert given.levels.shape[2] == (4 if mode == "RGB" else 2)
    assert (given.alpha() == 255).sum() == 12 and (given.alpha() == 0).sum() == 9 * 12 - 12


def test_transparent_parts_look_white():
    layer = np.zeros((2, 2, 4), np.uint8)
    layer[0, 0] = (200, 100, 0, 255)
    pixels = read(Image.fromarray(layer)).pixels()
    assert pixels[0, 0].tolist() == [200, 100, 0] and (pixels[1] == 255).all()


def test_palettes_inks_and_bits():
    colours = Image.fromarray(NOISE[:, :, :3]).quantize(16)
    assert np.array_equal(read(colours).pixels(), np.asarray(colours.convert("RGB")))
    see_through = read(colours, transparency=3)
    assert see_through.levels.shape[2] == 4
    assert np.array_equal(see_through.alpha() == 0, np.asarray(colours) == 3)
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(read(inks, "JPEG").pixels().astype(int) - (255, 0, 0)).max() < 8
    bits = Image.fromarray(NOISE[:, :, 0] > 99)
    assert np.array_equal(read(bits).pixels()[:, :, 1] == 255, np.asarray(bits))
    assert read(MODES["I;16"]).pixels()[0, 0, 0] == round(int(DEEP[0, 0, 0]) / 257)
    assert np.array_equal(read(MODES["L"], "TIFF").pixels()[:, :, 0], NOISE[:, :, 0])


def test_colours_of_16_bits_of_others_than_png_say_that_they_were_shortened():
    """Pillow reads them as 8; it writes none, so here is the least TIFF of one pixel."""
    tags = {256: 1, 257: 1, 258: 122, 259: 1, 262: 2, 273: 128, 277: 3, 278: 1, 279: 6}
    entries = [struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, value) for tag, value in tags.items()]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4)
    assert len(head) == 122
    given = source_image(head + struct.pack("<6H", 16, 16, 16, 0x1234, 0x5678, 0x9ABC), "deep.tif")
    assert given.notes == ("deep.tif has colours of 16 bits; the upper 8 bits were kept",)
    assert given.pixels().tolist() == [[[0x12, 0x56, 0x9A]]]
    assert not any(read(image).notes for image in MODES.values())


def test_upright_with_resolution_and_profile():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    profile = b"not a real profile"
    given = read(MODES["RGB"], exif=exif, dpi=(300, 300), icc_profile=profile)
    assert given.size == (9, 12)
    assert np.array_equal(given.pixels(), np.rot90(NOISE[:, :, :3], -1))
    with Image.open(BytesIO(png_bytes(given.replaced(given.paint(), NOWHERE.T)))) as out:
        assert round(out.info["dpi"][0]) == 300 and out.info["icc_profile"] == profile
        assert not out.getexif()


def test_16_bits_upright_with_resolution():
    exif = Image.Exif()
    exif[0x0112] = 6
    metre = {"x_pixels_per_unit": 11811, "y_pixels_per_unit": 11811, "unit_is_meter": True}
    chunks = [*png.Reader(bytes=deep_content(DEEP, **metre)).chunks()]
    chunks.insert(1, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    file = BytesIO()
    png.write_chunks(file, chunks)
    given = source_image(file.getvalue(), "deep")
    assert given.size == (9, 12) and np.array_equal(given.levels, np.rot90(DEEP, -1))
    with Image.open(BytesIO(png_bytes(given.replaced(given.paint(), NOWHERE.T)))) as out:
        assert round(out.info["dpi"][0]) == 300 and not out.getexif()


def test_padded():
    for mode, image in MODES.items():
        larger = read(image).padded((1, 2, 3, 4))
        assert larger.size == (16, 15) and larger.levels.shape[2] == CHANNELS[mode]
        assert np.array_equal(larger.levels[2:11, 1:13], np.asarray(image).reshape(9, 12, -1))
        assert larger.levels[11:].max() == 0


def animation(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return content(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"a shopping list", "it is not an image of a known format"),
        (b"", "it is not an image"),
        (content(MODES["RGB"])[:200], "the image it cannot be read: "),
        (deep_content(DEEP)[:400], "the image it cannot be read: "),
        (content(MODES["RGB"], "JPEG")[:-90], "the image it cannot be read: "),
        (animation("GIF"), "the image it has 2 frames: give a single one"),
        (animation("PNG"), "the image it has 2 frames"),
        (animation("TIFF"), "the image it has 2 frames"),
        (content(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "the image it has floating-point pixels"),
    ],
)
def test_what_cannot_be_used(bad, message):
    with pytest.raises(InputError) as caught:
        source_image(bad, "it")
    assert str(caught.value).startswith(message)


def test_what_memory_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(decode, "most_pixels", lambda: 30)
    with pytest.raises(InputError, match=r"cannot be read: it has 6 × 6 pixels, and memory suffices for"):
        source_image(content(Image.new("L", (6, 6))), "it")


@pytest.mark.parametrize("limit", [30, 10])
def test_pillows_own_limit_is_none(monkeypatch, limit):
    """It warns of an image over its limit and refuses one over twice that; telephones make larger ones."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert source_image(content(Image.new("L", (6, 6))), "it").size == (6, 6)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.skipif(os.name == "nt", reason="no devices as on Unix")
@pytest.mark.parametrize("read", [read_source_image, read_provenance])
def test_files_without_end(monkeypatch, read):
    monkeypatch.setattr(decode, "_MOST_BYTES", 1 << 20)
    with pytest.raises(InputError, match=r"^the image /dev/zero cannot be read: it is longer than"):
        read("/dev/zero")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read: No such file"):
        read_source_image(str(tmp_path / "none.png"))
    with pytest.raises(InputError, match=r"cannot be read: "):
        read_source_image(str(tmp_path))
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match=r"empty\.png is empty: an image is expected$"):
        read_source_image(str(tmp_path / "empty.png"))
    with pytest.raises(InputError, match=r"^the name of an image is empty"):
        read_source_image("")
    with pytest.raises(InputError, match=r"cannot be read: "):
        read_source_image("a\0b")
