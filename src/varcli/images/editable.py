"""Images in, to be edited: read whatever their kind, and put back as they were where nothing changed.

Pixels are uint8 arrays, height × width × 3, as everywhere below the sampler; a photograph's own levels may be
grey, transparent or of 16 bits, and come out so again.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from varcli.errors import InputError
from varcli.images.png16 import Levels, read_png, to_8_bits
from varcli.images.provenance import Raster

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from varcli.images.provenance import Pixels


STANDARD_INPUT = "-"

_KEPT_MODES = ("L", "LA", "RGB", "RGBA", "I;16")
"""Kinds of pixels that a PNG holds as they are; the others come out as RGB."""


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image as its file has it, upright."""

    name: str
    """Where it comes from, for messages."""
    levels: Levels
    """(height, width, channels): grey, grey and alpha, RGB or RGBA, of 8 or 16 bits."""
    sha256: str
    """Of the file."""
    info: dict[str, Any] = field(default_factory=dict)
    """Its resolution and colour profile, `dpi` and `icc_profile`, where the file has them."""
    shortened: bool = False
    """Whether its file has colours of 16 bits, of which the upper 8 are here."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width, _ = self.levels.shape
        return width, height

    @property
    def colours(self) -> int:
        """How many channels it has besides alpha: 1 or 3."""
        return 3 if self.levels.shape[2] > 2 else 1

    def seen(self) -> Levels:
        """What one sees of it, (height, width, 3), in its own bits; on white where it is transparent."""
        colours = self.levels[:, :, : self.colours]
        if self.levels.shape[2] == self.colours:
            return np.repeat(colours, 3 // self.colours, axis=2)
        if self.levels.dtype == np.uint8:
            layer = Image.fromarray(self.levels).convert("RGBA")
            return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))
        alpha = self.levels[:, :, -1:] / 65535
        mixed = (colours * alpha + 65535 * (1 - alpha)).round().astype(np.uint16)
        return np.repeat(mixed, 3 // self.colours, axis=2)

    def pixels(self) -> "Pixels":
        """What one sees of it in 8 bits."""
        return to_8_bits(self.seen())

    def alpha(self) -> "Pixels | None":
        """How opaque it is, (height, width) from 0 to 255; None where it has no such channel."""
        return None if self.levels.shape[2] == self.colours else to_8_bits(self.levels[:, :, -1])

    def padded(self, margins: tuple[int, int, int, int]) -> "SourceImage":
        """Return it with empty margins: left, top, right, bottom in pixels."""
        left, top, right, bottom = margins
        return replace(self, levels=np.pad(self.levels, ((top, bottom), (left, right), (0, 0))))

    def replaced(self, pixels: Levels, shown: "NDArray[np.bool_] | None" = None) -> Raster:
        """Return it with other pixels, of its own kind and with its own resolution and colour profile.

        Where `pixels` are what `self.seen()` gave, its own stay to the last bit.

        Args:
            pixels: of the same size and as many bits.
            shown: what was transparent and is to be seen from now on, (height, width); None is nothing.
        """
        changed = (pixels != self.seen()).any(axis=2)
        if shown is not None:
            changed |= shown
        own = self.levels.copy()
        own[:, :, : self.colours][changed] = (pixels if self.colours == 3 else grey_levels(pixels)[:, :, None])[changed]
        if shown is not None and own.shape[2] > self.colours:
            own[:, :, -1][shown] = np.iinfo(own.dtype).max
        return Raster(own, self.info)


def grey_levels(levels: Levels) -> Levels:
    """How bright colours are, (height, width), of as many bits; greys, of one channel, are as they are.

    Source: ITU-R BT.601, in the fixed-point numbers of Pillow, so that both agree.
    """
    if levels.shape[2] == 1:
        return levels[:, :, 0]
    total = levels.astype(np.uint64) @ np.array((19595, 38470, 7471), np.uint64)
    return ((total + np.uint64(1 << 15)) >> np.uint64(16)).astype(levels.dtype)


def read_source_image(source: str) -> SourceImage:
    """Return the image of a file, or of standard input for ``-``.

    It is turned upright as its camera meant it. Palettes, ink and other colour spaces become RGB, by
    the file's profile where inks have one.

    Raises:
        InputError: it cannot be read, is no image, is cut off, has several frames, or would take too
            much memory.
    """
    if source == STANDARD_INPUT:
        if sys.stdin.isatty():
            raise InputError("standard input is a terminal; send an image through a pipe, or name a file")
        name, content = "standard input", sys.stdin.buffer.read()
    else:
        name = source
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise InputError(f"the image {source} cannot be read: {error.strerror or error}") from error
    return source_image(content, name)


def source_image(content: bytes, name: str) -> SourceImage:
    """Return the image that a file's content holds; `name` is what to call it in messages."""
    with _reading(name), Image.open(BytesIO(content)) as opened:
        frames = getattr(opened, "n_frames", 1)
        if frames > 1 and opened.format != "MPO":  # cameras add a second view to their photographs
            raise InputError(f"the image {name} has {frames} frames: give a single one, such as its first frame as PNG")
        cut = any(";16" in str(tile[3]) for tile in opened.tile) and opened.mode != "I;16"
        opened.load()
        info = {key: opened.info[key] for key in ("dpi", "icc_profile") if opened.info.get(key)}
        deep = opened.format == "PNG" and (cut or (opened.mode == "I;16" and "transparency" in opened.info))
        levels = _deep_levels(content, opened) if deep else _levels(ImageOps.exif_transpose(opened), name)
    if opened.mode == "CMYK":
        info.pop("icc_profile", None)  # of the inks
    return SourceImage(name, levels, sha256(content).hexdigest(), info, shortened=cut and not deep)


def _deep_levels(content: bytes, opened: Image.Image) -> Levels:
    """Return the upright levels of a PNG of 16 bits whose head Pillow has read."""
    layers = [Image.fromarray(np.ascontiguousarray(layer)) for layer in np.moveaxis(read_png(content), 2, 0)]
    for layer in layers:
        layer.info = dict(opened.info)  # says how to turn it
    return np.dstack([np.asarray(ImageOps.exif_transpose(layer)) for layer in layers])


def _levels(image: Image.Image, name: str) -> Levels:
    values = np.asarray(_for_png(image, name))
    return values if values.ndim == 3 else values[:, :, None]


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn whatever a decoder makes of bad bytes into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata does no harm to pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (InputError, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise InputError(f"the image {name} is too large: at most {most} million pixels are read") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image of a known format, such as PNG or JPEG") from error
    except Exception as error:  # decoders fed broken bytes raise nearly anything, struct.error to SyntaxError
        raise InputError(f"the image {name} cannot be read: {str(error) or type(error).__name__}") from error


def _for_png(image: Image.Image, name: str) -> Image.Image:
    """Return an image in a mode that PNGs hold, without loss where it has one."""
    if image.mode == "F":
        raise InputError(f"the image {name} has floating-point pixels of unknown range: give one of 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits a pixel, also where held in 32
        return Image.fromarray(np.asarray(image).clip(0, 65535).astype(np.uint16))
    if image.mode == "CMYK":
        return _from_inks(image)
    if image.has_transparency_data:
        return image if image.mode in _KEPT_MODES else image.convert("LA" if image.mode == "L" else "RGBA")
    if image.mode in _KEPT_MODES:
        return image.copy()
    return image.convert("L" if image.mode == "1" else "RGB")


def _from_inks(image: Image.Image) -> Image.Image:
    """Return a CMYK image as sRGB, by its profile if it has a usable one."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            inks, screen = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, inks, screen, outputMode="RGB")
        except (OSError, ImageCms.PyCMSError):
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")
