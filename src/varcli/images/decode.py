"""Decode image files to RGB; resize and crop them to squares.

Shapes: P pixels a side.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from varcli.errors import InputError


def center_crop(image: Image.Image, pixels: int) -> NDArray[np.uint8]:
    """Return the middle of an image as uint8 (pixels, pixels, 3), its shorter side brought to `pixels`.

    While the shorter side is twice that or more, the image is halved by averaging; the rest of the way is
    Pillow's cubic filter, which has no aliasing.

    Source: the preparation of ImageNet in ADM (arXiv 2105.05233), whose reference batches are made so.
    """
    while min(image.size) >= 2 * pixels:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = pixels / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - pixels) // 2, (height - pixels) // 2
    return np.asarray(image.crop((left, top, left + pixels, top + pixels)))


class UnreadableImage(InputError):  # noqa: N818 - what it is, said by its name
    """An image that cannot be decoded."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"image: {name} cannot be read; {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type["UnreadableImage"], tuple[str, str]]:  # workers hand it to their parent
        return UnreadableImage, (self.name, self.reason)


# --- decoding --------------------------------------------------------------------------------------


def decode_image(data: bytes, name: str) -> Image.Image:
    """Return an image file's content as RGB, upright as its camera meant it, its first frame.

    Sixteen-bit greys are brought to eight; whatever is transparent shows white.

    Raises:
        UnreadableImage: the bytes are no image, or are broken or cut off.
    """
    with reading_image(name), Image.open(BytesIO(data)) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def reading_image(name: str) -> Iterator[None]:
    """Turn whatever goes wrong while an image is read or decoded into `UnreadableImage`."""
    try:
        yield
    except (MemoryError, UnreadableImage):
        raise
    except Exception as error:  # decoders fed broken bytes raise nearly anything, struct.error to SyntaxError
        reason = "no image, or of a kind not known" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableImage(name, reason or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, also where held in 32
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def square_crop(
    image: Image.Image, pixels: int, enlarge: float = 1.0, corner: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Return a square of an image as uint8 (pixels, pixels, 3).

    Args:
        image: an RGB image.
        pixels: side of the square.
        enlarge: the shorter side is first brought to this many times `pixels`, by Lanczos.
        corner: left and top edge of the square as shares in [0, 1] of the room there is; None is the centre.

    Source: section 4 of the paper's released recipe: 1.125 times the size, then a random crop.
    """
    short = round(pixels * enlarge)
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (round(share * (side - pixels)) for share, side in zip(corner or (0.5, 0.5), image.size, strict=True))
    return np.asarray(image.crop((left, top, left + pixels, top + pixels)))
