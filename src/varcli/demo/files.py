"""Files in and out of the page: photographs, painted masks and downloads. No Gradio here.

Shapes: H and W of a photograph in pixels; h and w of the canvas on which its mask is painted.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.ImageOps

from varcli.errors import InputError
from varcli.files import write_atomically
from varcli.images.decode import open_image, reading_image
from varcli.images.editable import SourceImage, source_image
from varcli.images.image import Image
from varcli.images.provenance import image_filename, png_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_FILE = 20 * 2**20
"""Bytes of an upload."""
MOST_PIXELS = 16_000_000
"""Of an upload; photographs of phones have 12 million."""
CANVAS = 768
"""Pixels of the canvas's longer side."""


def read_photo(upload: str | None) -> SourceImage:
    """Read an uploaded photograph under its own name, so that no command shows where the server keeps it.

    Raises:
        InputError: it is no image, or too large, or was not uploaded.
    """
    if upload is None:
        raise InputError("there is no photograph: upload one first")
    path = Path(upload)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path.name} is no longer stored: upload it again") from error
    with reading_image(path.name), open_image(content) as opened:
        width, height = opened.size
    if width * height > MOST_PIXELS:
        raise InputError(f"{path.name} has {width} × {height} pixels: give an image of at most {MOST_PIXELS:,} pixels")
    return source_image(content, path.name.lstrip("-"))  # a leading - would make it an option of the command


def canvas(photo: SourceImage) -> PIL.Image.Image:
    """The photograph to paint on: upright, its longer side `CANVAS` pixels."""
    return PIL.ImageOps.contain(PIL.Image.fromarray(photo.pixels()), (CANVAS, CANVAS))


def painted_mask(layers_hw4: "Sequence[NDArray[np.uint8]]", photo: SourceImage) -> SourceImage:
    """The mask painted on a photograph's canvas, as a PNG file of the photograph's size.

    Args:
        layers_hw4: what was painted, RGBA; whatever is not transparent is marked.
        photo: gives the mask its size and its name.

    Returns:
        (H, W, 1), 255 where to fill.

    Raises:
        InputError: nothing was painted.
    """
    painted = [layer_hw4[:, :, 3] > 0 for layer_hw4 in layers_hw4]
    if not any(layer_hw.any() for layer_hw in painted):
        raise InputError("nothing is painted: paint over what is to be filled")
    mask = PIL.Image.fromarray(np.logical_or.reduce(painted).astype(np.uint8) * 255)
    mask_HW = np.asarray(mask.resize(photo.size, PIL.Image.Resampling.NEAREST))
    return source_image(png_bytes(mask_HW[:, :, None]), f"{Path(photo.name).stem}-mask.png")


def save_image(image: Image, folder: Path) -> Path:
    """Write an image with its provenance, under the name that a command gives it; return its path."""
    return _save(image.png(), image_filename(image.provenance), folder)


def save_frame(image: Image, folder: Path) -> Path:
    """Write an unfinished image; return its path. It has no provenance: no command reproduces it."""
    return _save(png_bytes(image.array), "frame.png", folder)


def save_mask(mask: SourceImage, folder: Path) -> Path:
    """Write a mask under its name, with the bytes whose hash is in the provenance of the edit; return its path."""
    return _save(png_bytes(mask.levels), mask.name, folder)


def _save(content: bytes, name: str, folder: Path) -> Path:
    """Write a file into a folder of its own, as images that differ in their settings alone have one name.

    It is there whole at any time: a browser may be reading the same file.
    """
    path = folder / sha256(content).hexdigest()[:16] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path
