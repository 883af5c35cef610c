"""Levels of 16 bits and of 8 mean the same, and PNGs of 16 bits a channel are read and written whole."""

from io import BytesIO

import numpy as np
import png
import pytest
from PIL import Image

from varcli.images.png16 import as_deep_as, deep_png_bytes, read_png, step, to_8_bits

DEEP = np.random.RandomState(0).randint(0, 65536, (7, 5, 4)).astype(np.uint16)
FLAT = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)


def written(values, **options):
    file = BytesIO()
    height, width, channels = values.shape
    writer = png.Writer(width, height, greyscale=channels < 3, alpha=channels % 2 == 0, bitdepth=16, **options)
    writer.write(file, values.reshape(height, -1).tolist())
    return file.getvalue()


def test_8_bits_among_16():
    deep = as_deep_as(FLAT, DEEP)
    assert deep.dtype == np.uint16 and deep.max() == 65535 and step(deep) == 257
    assert np.array_equal(to_8_bits(deep), FLAT) and np.array_equal(to_8_bits(deep[1:] - 128), FLAT[1:])
    assert as_deep_as(FLAT, FLAT) is FLAT and to_8_bits(FLAT) is FLAT and step(FLAT) == 1


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_reads_what_others_write(channels, interlace):
    values = DEEP[:, :, :channels]
    assert np.array_equal(read_png(written(values, interlace=interlace)), values)


def test_every_filter_of_lines():
    """Pillow uses them; its RGBA of 8 bits takes as many bytes as grey and alpha of 16."""
    slope = np.add.outer(np.arange(40), 2 * np.arange(30)).astype(np.uint8)
    given, file, deep = np.dstack([slope, slope // 2, 255 - slope, slope // 3]), BytesIO(), BytesIO()
    Image.fromarray(given).save(file, "PNG")
    chunks = png.Reader(bytes=file.getvalue()).chunks()
    png.write_chunks(deep, [(n, d[:8] + b"\x10\x04" + d[10:] if n == b"IHDR" else d) for n, d in chunks])
    assert np.array_equal(read_png(deep.getvalue()), given.view(">u2"))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_becomes_alpha(channels):
    values = DEEP[:, :, :channels]
    colour = tuple(values[2, 3].tolist())
    read = read_png(written(values, transparent=colour if channels > 1 else colour[0]))
    assert np.array_equal(read[:, :, :-1], values)
    assert np.argwhere(read[:, :, -1] == 0).tolist() == [[2, 3]] and (read[0, :, -1] == 65535).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_writes_what_others_read(channels):
    values = DEEP[:, :, :channels]
    content = deep_png_bytes(values, 3)
    width, height, rows, info = png.Reader(bytes=content).read()
    assert (width, height, info["bitdepth"], info["planes"]) == (5, 7, 16, channels)
    assert np.array_equal(np.vstack([list(row) for row in rows]).reshape(values.shape), values)


def test_missing_rows():
    chunks = list(png.Reader(bytes=written(DEEP)).chunks())
    file, taller = BytesIO(), b"\0\0\0\x09"
    png.write_chunks(file, [(n, d[:4] + taller + d[8:] if n == b"IHDR" else d) for n, d in chunks])
    with pytest.raises(png.Error):
        read_png(file.getvalue())
