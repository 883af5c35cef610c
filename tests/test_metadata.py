"""What a file says of itself goes into the PNG that is made of it, or is named, and never makes it unreadable."""

import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import png
import pytest
from PIL import Image, PngImagePlugin

from varcli.errors import InputError
from varcli.images import decode
from varcli.images.decode import decode_image, open_image
from varcli.images.editable import source_image
from varcli.images.metadata import LARGEST_TEXT, chunks, png_texts, text_chunks
from varcli.images.provenance import png_bytes

PIXELS = np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(np.uint8)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF/></x:xmpmeta>'


def encoded(kind="PNG", image=None, **options):
    file = BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, kind, **options)
    return file.getvalue()


def chunk(name, data, checksum=None):
    checksum = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def with_chunk(name, data, checksum=None, content=None):
    content = content or encoded()
    return content[:33] + chunk(name, data, checksum) + content[33:]


def through(content):
    """An image as it comes out of an edit that changes nothing, with its notes."""
    given = source_image(content, "it")
    out = png_bytes(given.replaced(given.paint(), np.zeros(given.levels.shape[:2], bool)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(source_image(out, "out").levels, given.levels), "what is written can be read again"
    return out, given.notes


def exif():
    found = Image.Exif()
    found[0x8298] = "(c) somebody"
    found.get_ifd(0x8769)[0x9003] = "2024:01:02 03:04:05"  # Pillow leaves it out of a TIFF
    return found


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, 1, 6])
def test_exif_goes_along_but_for_the_orientation(kind, orientation):
    given = exif()
    if orientation:
        given[0x0112] = orientation
    out, notes = through(encoded(kind, exif=given))
    with Image.open(BytesIO(out)) as image:
        image.load()
        found = image.getexif()
        assert image.size == ((6, 8) if orientation == 6 else (8, 6))
        assert found[0x8298] == "(c) somebody"
        assert kind == "TIFF" or found.get_ifd(0x8769)[0x9003] == "2024:01:02 03:04:05"
        assert 0x0112 not in found and 0x0111 not in found
    assert notes == ()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_xmp_goes_along(kind):
    options = {"tiffinfo": {700: XMP}} if kind == "TIFF" else {"xmp": XMP}
    out, _ = through(encoded(kind, **options))
    with Image.open(BytesIO(out)) as image:
        assert image.info["XML:com.adobe.xmp"].encode().strip(b"\0") == XMP


def test_texts_of_a_png_go_along():
    info = PngImagePlugin.PngInfo()
    for keyword, text in (
        ("Comment", "one"),
        ("Comment", "two"),
        ("Title", "old"),
        ("varcli", "{}"),
        ("large", "x" * 9),
    ):
        info.add_text(keyword, text)
    info.add_itxt("prompt", "猫", zip=True)
    info.add_text("Raw profile type exif", "turned")
    info.add_text("large", "x" * (LARGEST_TEXT + 1), zip=True)
    info.add_text("workflow", "x" * (LARGEST_TEXT + 1), zip=True)
    out, notes = through(encoded(pnginfo=info))
    found = [(keyword, chunk.name) for keyword, chunk in text_chunks(out)]
    assert found == [("Comment", b"tEXt"), ("Comment", b"tEXt"), ("large", b"tEXt"), ("prompt", b"iTXt")]
    assert png_texts(out) == {"Comment": "two", "large": "x" * 9, "prompt": "猫"}
    assert notes == ("the text workflow (damaged, or larger than 1 MB) of it is left out",)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (b"gAMA", struct.pack(">I", 100000)),
        (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)),
        (b"sRGB", b"\0"),
        (b"cICP", bytes([9, 16, 0, 1])),
        (b"pHYs", struct.pack(">IIB", 2, 1, 0)),
        (b"pHYs", struct.pack(">IIB", 3000, 6000, 1)),
    ],
)
def test_what_says_how_a_png_looks_goes_along(name, data):
    out, _ = through(with_chunk(name, data))
    assert [c.data for c in chunks(out) if c.name == name] == [data]


@pytest.mark.parametrize(
    "content",
    [
        encoded("TIFF", dpi=(72, 72)).replace(b"\x48\0\0\0\x01\0\0\0", bytes(8)),
        encoded("TIFF", dpi=(72, 72)).replace(b"\x48\0\0\0\x01\0\0\0", b"\x01\0\0\0" + bytes(4)),
        encoded("TIFF", dpi=(72, 72)).replace(b"\x48\0\0\0\x01\0\0\0", b"\xff\xff\xff\xff\x01\0\0\0"),
        encoded("TIFF"),
        with_chunk(b"pHYs", struct.pack(">IIB", 0, 0, 1)),
        with_chunk(b"pHYs", struct.pack(">IIB", 0, 7, 0)),
        with_chunk(b"pHYs", b"\0"),
        encoded("BMP").replace(b"\xc4\x0e\0\0\xc4\x0e\0\0", bytes(8)),
    ],
    ids=["0/0", "1/0", "too large", "none", "zero", "flat", "cut off", "bmp"],
)
def test_a_resolution_that_is_none_is_left_out(content):
    out, notes = through(content)
    assert not [c for c in chunks(out) if c.name == b"pHYs"] and notes == ()


def test_a_turned_photograph_has_its_resolution_turned():
    turn = Image.Exif()
    turn[0x0112] = 6
    out, _ = through(encoded("JPEG", exif=turn, dpi=(300, 150)))
    with Image.open(BytesIO(out)) as image:
        assert [round(value) for value in image.info["dpi"]] == [150, 300]


def profile(space, size=200):
    return bytes(16) + space + bytes(size - 20)


@pytest.mark.parametrize(
    ("kind", "given", "kept", "note"),
    [
        ("JPEG", profile(b"RGB "), True, ""),
        ("JPEG", profile(b"GRAY"), True, ""),
        ("TIFF", profile(b"Lab "), False, ""),
        ("JPEG", profile(b"CMYK"), False, ""),
        ("TIFF", profile(b"RGB ", LARGEST_TEXT), True, ""),
        ("TIFF", profile(b"RGB ", 2 * LARGEST_TEXT), False, "the colour profile of 2.0 MB of it is left out"),
        ("WEBP", profile(b"RGB ", 2 * LARGEST_TEXT), False, "the colour profile of 2.0 MB of it is left out"),
        ("PNG", profile(b"RGB ", 2 * LARGEST_TEXT), False, "the colour profile (damaged, or larger than 1 MB)"),
    ],
)
def test_profiles_go_along_where_they_fit(kind, given, kept, note):
    out, notes = through(encoded(kind, icc_profile=given))
    with Image.open(BytesIO(out)) as image:
        assert (image.info.get("icc_profile") == given) == kept
    assert " ".join(notes).startswith(note) and bool(notes) == bool(note)


def big_text(kind):
    info = PngImagePlugin.PngInfo()
    if kind == "iTXt":
        info.add_itxt("workflow", "x" * LARGEST_TEXT + "y", zip=True)
    elif kind == "many":
        for number in range(70):
            info.add_text(f"part {number}", "x" * LARGEST_TEXT, zip=True)
    else:
        info.add_text("workflow", "x" * LARGEST_TEXT + "y", zip=kind == "zTXt")
    return encoded(pnginfo=info)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        *map(big_text, ("iTXt", "zTXt", "tEXt", "many")),
        with_chunk(b"tEXt", b"a\0b", checksum=0),
        with_chunk(b"zTXt", b"a\0\0no zlib"),
        with_chunk(b"iTXt", b"no zeros"),
        with_chunk(b"gAMA", b"\0"),
        with_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(bytes(2 * LARGEST_TEXT))),
        with_chunk(b"eXIf", b"garbage"),
    ],
    ids=["iTXt", "zTXt", "tEXt", "many", "checksum", "no zlib", "no text", "short", "profile", "exif"],
)
def test_descriptions_that_cannot_be_read_do_not_spoil_an_image(content):
    out, _ = through(content)
    assert np.array_equal(source_image(content, "it").levels, PIXELS)
    assert np.array_equal(np.asarray(decode_image(content, "it")), PIXELS)
    assert len(out) < 1 << 20


def test_damaged_pixels_are_still_an_error():
    content = bytearray(encoded())
    content[content.index(b"IDAT") + 8] ^= 1
    with pytest.raises(InputError, match="cannot be read"):
        source_image(bytes(content), "it")


def test_16_bits_with_descriptions_that_cannot_be_read():
    file, levels = BytesIO(), np.random.RandomState(0).randint(0, 65536, (6, 8, 3))
    png.Writer(8, 6, greyscale=False, bitdepth=16).write(file, levels.reshape(6, -1).tolist())
    out, _ = through(with_chunk(b"tEXt", b"a\0b", checksum=0, content=file.getvalue()))
    assert np.array_equal(source_image(out, "out").levels, levels)
    out, _ = through(with_chunk(b"cICP", bytes([9, 16, 0, 1]), content=file.getvalue()))
    assert b"cICP" in out


def test_texts_of_a_png():
    info = PngImagePlugin.PngInfo()
    info.add_text("plain", "ä")
    info.add_text("packed", "long " * 9, zip=True)
    info.add_itxt("other", "猫", zip=True)
    content = encoded(pnginfo=info)
    assert png_texts(content) == {"plain": "ä", "packed": "long " * 9, "other": "猫"}
    assert png_texts(b"no png") == png_texts(content[:40]) == {}


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho ran >> {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for read in (source_image, decode_image):
        with pytest.raises(InputError, match="not an image"):
            read(POSTSCRIPT, "photo.png")
    assert not (tmp_path / "ran").exists()


def test_images_are_opened_in_one_place():
    source = Path(decode.__file__).parents[1]
    found = [path.name for path in source.rglob("*.py") if "Image.open(" in path.read_text(encoding="utf-8")]
    assert found == ["decode.py"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "TGA"])
def test_formats_that_are_read(kind):
    with open_image(encoded(kind)) as image:
        assert image.format == kind
