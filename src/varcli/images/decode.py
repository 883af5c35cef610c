"""Decode image files to RGB; resize and crop images to squares.

Shapes: P pixels per side.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Lock
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from varcli.errors import InputError
from varcli.files import machine_memory, read_in_pieces
from varcli.images.metadata import readable_png


class UnreadableImage(InputError):  # noqa: N818 - what it is, said by its name
    """An image that cannot be decoded."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read image {name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type["UnreadableImage"], tuple[str, str]]:  # worker processes send it to their parent
        return UnreadableImage, (self.name, self.reason)


# --- decoding --------------------------------------------------------------------------------------


def decode_image(data: bytes, name: str) -> Image.Image:
    """The first frame of an image file as RGB, upright as its EXIF orientation says.

    Greys of more than eight bits are reduced to them (see `_eight_bits`); transparency becomes white.

    Raises:
        UnreadableImage: the content is not an image, is damaged or truncated, or has greys of unknown range.
    """
    with reading_image(name), open_image(data) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        return _to_rgb(upright if image.mode[0] not in "IF" else _eight_bits(upright, image.format == "TIFF"))


@contextmanager
def reading_image(name: str) -> Iterator[None]:
    """Raise `UnreadableImage` for any error while an image is read or decoded."""
    try:
        yield
    except (MemoryError, UnreadableImage):
        raise
    except Exception as error:  # decoders fed broken bytes raise nearly anything, struct.error to SyntaxError
        reason = "not an image, or of an unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableImage(name, reason or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image, any_range: bool) -> Image.Image:
    """Reduce greys of 16 or 32 bits to eight; with `any_range` the values tell what white is.

    Integers up to 255 and floats up to 255 are levels of eight bits, integers up to 65535 of sixteen; floats
    from 0 to 1 are fractions of white. PNG and PGM hold sixteen bits for certain, TIFF may hold anything.

    Raises:
        ValueError: there are other values.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= (255 if image.mode == "F" else 65535):
        raise ValueError(
            f"its 32-bit values are {low:g} to {high:g}; expected integers up to 65535, or floats from 0 to 1 or 255"
        )
    if image.mode == "F":
        levels = values * (255 if high <= 1 else 1) + 0.5
    else:
        levels = values // (1 if any_range and image.mode == "I" and high <= 255 else 257)
    return Image.fromarray(levels.astype(np.uint8))


# --- formats ---------------------------------------------------------------------------------------

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")
"""Formats that are read, whatever a file is called. Others may start programs, as PostScript starts Ghostscript."""

_BYTES_PER_PIXEL = 40
"""Peak memory of an edit."""

_MOST_PIXELS = 1 << 29
"""Most pixels of an image on any machine."""

_OPENING = Lock()

logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs about damaged files, which our own messages cover


def open_image(content: bytes) -> ImageFile.ImageFile:
    """Open an image file; its pixels are decoded when they are accessed.

    Raises:
        UnidentifiedImageError: it is of none of the formats.
        ValueError: it has more pixels than `most_pixels`.
        Exception: it is damaged.
    """
    Image.init()
    with _OPENING:
        # Pillow's limit of 89 million is less than some phones' photographs have.
        pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(BytesIO(readable_png(content)), formats=[name for name in FORMATS if name in Image.OPEN])
        finally:
            Image.MAX_IMAGE_PIXELS = pillows
    width, height = image.size
    if width * height > most_pixels():
        raise ValueError(
            f"it has {width} × {height} pixels, and memory suffices for {most_pixels() / 10**6:.0f} million"
        )
    return image


def read_image_file(file: BinaryIO, name: str) -> bytes:
    """Return the content of an image file.

    Raises:
        InputError: it is empty, or longer than a gigabyte.
        OSError: it cannot be read.
    """
    content = read_in_pieces(file, _MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise InputError(f"the image {name} cannot be read: it is longer than {_MOST_BYTES >> 30} GB")
    if not content:
        raise InputError(f"{name} is empty: an image is expected")
    return content


_MOST_BYTES = 1 << 30
"""Most bytes of an image file."""


def most_pixels() -> int:
    """Return the most pixels an image may have: as many as this machine's memory holds, at most 537 million."""
    return min((machine_memory() or 8 << 30) // _BYTES_PER_PIXEL, _MOST_PIXELS)


# --- squares ---------------------------------------------------------------------------------------


def square_crop(
    image: Image.Image, pixels: int, resize_ratio: float = 1.0, corner: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """A square of an image as uint8 (pixels, pixels, 3), resized with Lanczos.

    Args:
        image: an RGB image.
        pixels: side of the square.
        resize_ratio: the shorter side is first resized to this many times `pixels`.
        corner: left and top edge of the square as fractions in [0, 1] of the free space; None is the centre.

    Source: section 4 of the paper's released recipe: 1.125 times the size, then a random crop.
    """
    short = round(pixels * resize_ratio)
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    across, down = corner or (0.5, 0.5)
    left, top = round(across * (width - pixels)), round(down * (height - pixels))
    return _resized_crop(image, (width, height), pixels, left, top, Image.Resampling.LANCZOS)


def adm_crop(image: Image.Image, pixels: int) -> NDArray[np.uint8]:
    """The centre of an image as uint8 (pixels, pixels, 3), resized as ADM does.

    While the shorter side is at least twice `pixels`, the image is halved by averaging; Pillow's antialiased
    bicubic filter does the rest.

    Source: ADM's preparation of ImageNet (arXiv 2105.05233), which its reference batches went through.
    """
    while min(image.size) >= 2 * pixels:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = pixels / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    left, top = (width - pixels) // 2, (height - pixels) // 2
    return _resized_crop(image, (width, height), pixels, left, top, Image.Resampling.BICUBIC)


def _resized_crop(
    image: Image.Image, size: tuple[int, int], pixels: int, left: int, top: int, how: Image.Resampling
) -> NDArray[np.uint8]:
    """Resize an image and crop a square."""
    width, height = size
    if width * height > _RESIZED_WHOLE:  # a very long image, of which only a small part is needed
        across, down = image.width / width, image.height / height
        box = left * across, top * down, (left + pixels) * across, (top + pixels) * down
        return np.asarray(image.resize((pixels, pixels), how, box))
    if size != image.size:
        image = image.resize(size, how)
    return np.asarray(image.crop((left, top, left + pixels, top + pixels)))


_RESIZED_WHOLE = 1 << 26
"""Up to this number of pixels an image is resized before it is cropped; beyond, rounding may differ by a level."""
