"""Images to be edited: read in any format, and written back unchanged outside the edit.

Pixels are uint8 arrays, height × width × 3, as everywhere below the sampler; a photograph's own levels may be
grey, transparent or of 16 bits, and come out so again.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from varcli.errors import InputError
from varcli.images.blending import pull_push_fill
from varcli.images.decode import open_image, read_image_file
from varcli.images.metadata import read_metadata, readable_png
from varcli.images.png16 import Levels, Mask, read_png, to_8_bits
from varcli.images.provenance import Raster
from varcli.images.tiling import bounds

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
    """Its metadata, as `read_metadata` returns it."""
    notes: tuple[str, ...] = ()
    """Sentences about parts of the file that were left out."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width, _ = self.levels.shape
        return width, height

    @property
    def colours(self) -> int:
        """Number of channels besides alpha: 1 or 3."""
        return 3 if self.levels.shape[2] > 2 else 1

    def seen(self) -> Levels:
        """The image as it is seen, (height, width, 3), in its own bits; on white where it is transparent."""
        colours = self.levels[:, :, : self.colours]
        if self.levels.shape[2] == self.colours:
            return np.repeat(colours, 3 // self.colours, axis=2)
        if self.levels.dtype == np.uint8:
            layer = Image.fromarray(self.levels).convert("RGBA")
            return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))
        alpha = self.levels[:, :, -1:] / 65535
        mixed = (colours * alpha + 65535 * (1 - alpha)).round().astype(np.uint16)
        return np.repeat(mixed, 3 // self.colours, axis=2)

    def paint(self) -> Levels:
        """Its colours without transparency, (height, width, 3), in its own bits; white where fully transparent."""
        colours = self.levels[:, :, : self.colours]
        if self.levels.shape[2] > self.colours:
            colours = np.where(self.levels[:, :, -1:] == 0, np.iinfo(colours.dtype).max, colours).astype(colours.dtype)
        return colours if self.colours == 3 else np.repeat(colours, 3, axis=2)

    def pixels(self) -> "Pixels":
        """The image as it is seen, in 8 bits."""
        return to_8_bits(self.seen())

    def alpha(self) -> "Pixels | None":
        """How opaque it is, (height, width) from 0 to 255; None where it has no such channel."""
        return None if self.levels.shape[2] == self.colours else to_8_bits(self.levels[:, :, -1])

    def padded(self, margins: tuple[int, int, int, int]) -> "SourceImage":
        """Return it with empty margins: left, top, right, bottom in pixels."""
        left, top, right, bottom = margins
        return replace(self, levels=np.pad(self.levels, ((top, bottom), (left, right), (0, 0))))

    def replaced(self, pixels: Levels, hole: Mask) -> Raster:
        """Return it with other pixels, of its own kind and with its own metadata.

        Outside the hole its own stay to the last bit where `pixels` are what `self.paint()` gave, and wherever
        nothing is seen of them. In the hole the opacity continues that of what is seen around it, and is full
        where there is nothing.

        Args:
            pixels: of the same size and as many bits.
            hole: what is new, (height, width).
        """
        changed = (pixels != self.paint()).any(axis=2) | hole
        own = self.levels.copy()
        if own.shape[2] > self.colours:
            alpha = own[:, :, -1]
            known = ~hole & (alpha > 0)
            changed &= hole | known
            left, top, right, bottom = bounds(hole) if hole.any() else (0, 0, 0, 0)
            near = slice(max(top - _AROUND, 0), bottom + _AROUND), slice(max(left - _AROUND, 0), right + _AROUND)
            alpha[near][hole[near]] = _continued(alpha[near], known[near])[hole[near]]
        new = pixels[changed]
        own[:, :, : self.colours][changed] = new if self.colours == 3 else grey_levels(new[None])[0, :, None]
        return Raster(own, self.info)


_AROUND = 64
"""Pixels around a hole whose opacity counts."""


def _continued(alpha: "NDArray[np.unsignedinteger[Any]]", known: Mask) -> "NDArray[np.unsignedinteger[Any]]":
    """Return an opacity that is full where the known ones are, and else continues them smoothly."""
    most = np.iinfo(alpha.dtype).max
    if not known.any() or (alpha[known] == most).all():
        return np.full_like(alpha, most)
    smooth = pull_push_fill(alpha[:, :, None].astype(np.float32), known)[:, :, 0]
    return smooth.round().clip(1, most).astype(alpha.dtype)


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

    It is turned upright by its EXIF orientation. Palettes and other colour spaces become RGB; CMYK does so by the
    file's profile where there is one.

    Raises:
        InputError: it cannot be read, is no image, is cut off, has several frames, or would take too
            much memory.
    """
    if not source:
        raise InputError("the name of an image is empty: give a file, or - for standard input")
    if source == STANDARD_INPUT:
        if sys.stdin.isatty():
            raise InputError("standard input is a terminal; send an image through a pipe, or name a file")
        name = "standard input"
        content = read_image_file(sys.stdin.buffer, name)
    else:
        name = source
        try:
            with Path(source).open("rb") as file:
                content = read_image_file(file, name)
        except (OSError, ValueError) as error:  # a name with NUL in it is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"the image {source} cannot be read: {reason}") from error
    return source_image(content, name)


def source_image(content: bytes, name: str) -> SourceImage:
    """Return the image that a file's content holds; `name` is what to call it in messages."""
    with _reading(name), open_image(content) as opened:
        frames = getattr(opened, "n_frames", 1)
        if frames > 1 and opened.format != "MPO":  # cameras add a second view to their photographs
            raise InputError(f"the image {name} has {frames} frames: give a single one, such as its first frame as PNG")
        cut = any(";16" in str(tile[3]) for tile in opened.tile) and opened.mode != "I;16"
        if opened.format == "TIFF":  # it closes its file once it is loaded
            with suppress(Exception):
                _ = [opened.getexif().get_ifd(part) for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)]
        opened.load()
        upright = ImageOps.exif_transpose(opened)
        deep = opened.format == "PNG" and (cut or (opened.mode == "I;16" and "transparency" in opened.info))
        levels = _deep_levels(readable_png(content), opened) if deep else _levels(upright, name)
        info, left_out = read_metadata(opened, upright, content)
    notes = [f"the {what} of {name} is left out" for what in left_out]
    if cut and not deep:
        notes.append(f"{name} has colours of 16 bits; the upper 8 bits were kept")
    return SourceImage(name, levels, sha256(content).hexdigest(), info, tuple(notes))


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
    """Turn any error of a decoder into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata does no harm to pixels
            yield
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image of a known format, such as PNG or JPEG") from error
    except MemoryError as error:
        raise InputError(f"the image {name} does not fit into memory") from error
    except Exception as error:  # decoders fed broken bytes raise nearly anything, struct.error to SyntaxError
        raise InputError(f"the image {name} cannot be read: {str(error) or type(error).__name__}") from error


def _for_png(image: Image.Image, name: str) -> Image.Image:
    """Return an image in a mode that PNGs hold, without loss where it has one."""
    if image.mode == "F":
        raise InputError(f"the image {name} has floating-point pixels of unknown range: give one of 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits per pixel, also where stored in 32
        return Image.fromarray(np.asarray(image).clip(0, 65535).astype(np.uint16))
    if image.mode == "CMYK":
        return _from_inks(image)
    if image.mode in ("L", "RGB") and "transparency" in image.info:
        return _with_alpha(image)
    if image.has_transparency_data:
        return image if image.mode in _KEPT_MODES else image.convert("RGBA")
    if image.mode in _KEPT_MODES:
        return image.copy()
    return image.convert("L" if image.mode == "1" else "RGB")


def _with_alpha(image: Image.Image) -> Image.Image:
    """Return an image one of whose colours means transparent with an alpha channel."""
    levels, hidden = np.asarray(image), np.array(image.info["transparency"])
    seen = np.atleast_3d(levels != hidden).any(axis=2)
    return Image.fromarray(np.dstack([levels, seen * np.uint8(255)]))


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
