"""Images of 16 bits per channel: conversion to and from 8 bits, and PNGs, which Pillow reads with 8.

Levels are (height, width, channels), 0 to 255 as uint8 or 0 to 65535 as uint16; both ends mean the same.
"""

from io import BytesIO
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from varcli.images.provenance import Pixels


Levels = NDArray[np.unsignedinteger[Any]]
Mask = NDArray[np.bool_]
Numbers = NDArray[np.float32]

_STEP = 257
"""Difference in 16 bits between neighbouring levels of 8 bits."""


def step(levels: Levels) -> int:
    """How far apart neighbouring levels of 8 bits are among these: 1 or 257."""
    return _STEP if levels.dtype == np.uint16 else 1


def as_deep_as(pixels: "Pixels", levels: Levels) -> Levels:
    """Convert levels of 8 bits to the bits of others."""
    return pixels.astype(np.uint16) * np.uint16(_STEP) if levels.dtype == np.uint16 else pixels


def to_8_bits(levels: Levels) -> "Pixels":
    """Return the nearest levels of 8 bits."""
    if levels.dtype == np.uint16:
        return ((levels.astype(np.uint32) + _STEP // 2) // _STEP).astype(np.uint8)
    return levels.astype(np.uint8, copy=False)


# --- PNG -------------------------------------------------------------------------------------------


def read_png(content: bytes) -> Levels:
    """Read a PNG of 16 bits per channel: grey, grey and alpha, RGB or RGBA.

    A colour marked as transparent becomes an alpha channel.

    Raises:
        png.Error: it is damaged.
    """
    import png

    reader = png.Reader(bytes=content)
    width, height, rows, info = reader.read()
    values = np.empty((height, width, info["planes"]), np.uint16)
    flat = values.reshape(height, -1)
    count = -1
    for count, row in enumerate(islice(rows, height)):
        flat[count] = row
    if count + 1 < height:
        raise png.FormatError(f"{count + 1} of {height} rows")
    hidden = info.get("transparent")
    if hidden is None:
        return values
    seen = (values != np.array(hidden, np.uint16)).any(axis=2, keepdims=True)
    return np.dstack([values, seen * np.uint16(65535)])


def deep_png_bytes(values: Levels, compression: int) -> bytes:
    """Return a PNG file's content with all 16 bits.

    Args:
        values: uint16, with 1 to 4 channels.
        compression: level of zlib.
    """
    import png

    height, width, channels = values.shape
    writer = png.Writer(
        width, height, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=16, compression=compression
    )
    file = BytesIO()
    writer.write_packed(file, (row.tobytes() for row in values.astype(">u2")))
    return file.getvalue()
