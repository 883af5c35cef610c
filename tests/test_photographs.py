"""Pictures of every kind come in right, and go out as they came but where they were changed."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from varcli.data.images import png_bytes
from varcli.data.photographs import photograph, read_photograph
from varcli.errors import InputError

NOISE = np.random.RandomState(0).randint(0, 256, (9, 12, 4)).astype(np.uint8)
DEEP = np.random.RandomState(1).randint(0, 65536, (9, 12)).astype(np.uint16)


def content(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(image, kind="PNG", **options):
    return photograph(content(image, kind, **options), "it")


MODES = {
    "L": Image.fromarray(NOISE[:, :, 0]),
    "LA": Image.fromarray(NOISE[:, :, :2]),
    "RGB": Image.fromarray(NOISE[:, :, :3]),
    "RGBA": Image.fromarray(NOISE),
    "I;16": Image.fromarray(DEEP),
}


@pytest.mark.parametrize("mode", MODES)
def test_what_does_not_change_stays_to_the_last_bit(mode):
    given = read(MODES[mode])
    assert given.image.mode == mode
    pixels = given.pixels().copy()
    assert pixels.shape == (9, 12, 3) and pixels.dtype == np.uint8
    changed = np.zeros((9, 12), bool)
    changed[2:4, 5:8] = True
    pixels[changed] = (10, 20, 30)
    out = photograph(png_bytes(given.replaced(pixels)), "out")
    assert out.image.mode == mode
    assert np.array_equal(np.asarray(out.image)[~changed], np.asarray(MODES[mode])[~changed])
    assert np.asarray(out.image)[2, 5].tolist() == {
        "L": 18, "LA": [18, NOISE[2, 5, 1]], "RGB": [10, 20, 30], "RGBA": [10, 20, 30, NOISE[2, 5, 3]], "I;16": 18 * 257
    }[mode]  # fmt: skip


def test_alpha_is_kept_or_filled():
    given = read(MODES["RGBA"])
    shown = np.zeros((9, 12), bool)
    shown[:3] = True
    out = np.asarray(given.replaced(given.pixels(), shown))
    assert (out[:3, :, 3] == 255).all()
    assert np.array_equal(out[3:], NOISE[3:])
    assert np.array_equal(out[:3, :, :3], given.pixels()[:3])


def test_transparent_parts_look_white():
    layer = np.zeros((2, 2, 4), np.uint8)
    layer[0, 0] = (200, 100, 0, 255)
    pixels = read(Image.fromarray(layer)).pixels()
    assert pixels[0, 0].tolist() == [200, 100, 0] and (pixels[1] == 255).all()


def test_palettes_inks_and_bits():
    colours = Image.fromarray(NOISE[:, :, :3]).quantize(16)
    assert np.array_equal(read(colours).pixels(), np.asarray(colours.convert("RGB")))
    see_through = read(colours, transparency=3)
    assert see_through.image.mode == "RGBA"
    assert np.array_equal(see_through.alpha() == 0, np.asarray(colours) == 3)
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(read(inks, "JPEG").pixels().astype(int) - (255, 0, 0)).max() < 8
    bits = Image.fromarray(NOISE[:, :, 0] > 99)
    assert np.array_equal(read(bits).pixels()[:, :, 1] == 255, np.asarray(bits))
    assert read(MODES["I;16"]).pixels()[0, 0, 0] == round(int(DEEP[0, 0]) / 257)
    assert np.array_equal(read(MODES["L"], "TIFF").pixels()[:, :, 0], NOISE[:, :, 0])


def test_colours_of_16_bits_say_that_they_were_shortened():
    """Pillow reads and writes them as 8; greys it has whole."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 1, 256, 65535) for _ in range(3))
    header = struct.pack(">IIBBBBB", 2, 3, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    given = photograph(b"\x89PNG\r\n\x1a\n" + parts, "deep")
    assert given.shortened
    assert given.pixels()[2].tolist() == [[0x12, 0x56, 0x9A], [0, 1, 255]]
    assert not any(read(image).shortened for image in MODES.values())


def test_upright_with_resolution_and_profile():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    profile = b"not a real profile"
    given = read(MODES["RGB"], exif=exif, dpi=(300, 300), icc_profile=profile)
    assert given.size == (9, 12)
    assert np.array_equal(given.pixels(), np.rot90(NOISE[:, :, :3], -1))
    with Image.open(BytesIO(png_bytes(given.replaced(given.pixels())))) as out:
        assert round(out.info["dpi"][0]) == 300 and out.info["icc_profile"] == profile
        assert not out.getexif()


def test_padded():
    for mode, image in MODES.items():
        larger = read(image).padded((1, 2, 3, 4))
        assert larger.size == (16, 15) and larger.image.mode == mode
        assert np.array_equal(np.asarray(larger.image)[2:11, 1:13], np.asarray(image))


def animation(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return content(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"a shopping list", "picture: it; no picture, or of a kind not known"),
        (b"", "picture: it; no picture"),
        (content(MODES["RGB"])[:200], "picture: it cannot be read; "),
        (content(MODES["RGB"], "JPEG")[:-90], "picture: it cannot be read; "),
        (animation("GIF"), "picture: it has 2 frames; one picture"),
        (animation("PNG"), "picture: it has 2 frames"),
        (animation("TIFF"), "picture: it has 2 frames"),
        (content(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "picture: it has floating-point pixels"),
    ],
)
def test_what_cannot_be_used(bad, message):
    with pytest.raises(InputError) as caught:
        photograph(bad, "it")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("side", [6, 9])
def test_decompression_bombs(monkeypatch, side):
    """Pillow warns of a picture over its limit and refuses one over twice that; both are too large here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(InputError, match=r"^picture: it is too large; at most 0 million pixels"):
        photograph(content(Image.new("L", (side, side))), "it")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read; No such file"):
        read_photograph(str(tmp_path / "none.png"))
    with pytest.raises(InputError, match=r"cannot be read; "):
        read_photograph(str(tmp_path))
