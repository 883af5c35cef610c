"""Pictures in, to be edited: read whatever their kind, and put back as they were where nothing changed.

Pixels are uint8 arrays, height × width × 3, as everywhere below the sampler; a photograph's own may be
grey, transparent or of 16 bits, and come out so again.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from varcli.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from varcli.data.images import Pixels

STANDARD_INPUT = "-"

_KEPT_MODES = ("L", "LA", "RGB", "RGBA", "I;16")
"""Kinds of pixels that a PNG holds as they are; the others come out as RGB."""


@dataclass(frozen=True, slots=True)
class Photograph:
    """A picture as its file has it, upright."""

    name: str
    """Where it comes from, for messages."""
    image: Image.Image
    """In one of the modes that PNGs hold; `info` has its resolution and colour profile where the file has."""
    sha256: str
    """Of the file."""
    shortened: bool = False
    """Whether its file has colours of 16 bits, of which the upper 8 are here."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size

    def pixels(self) -> "Pixels":
        """Return what one sees of it, on white where it is transparent."""
        if self.image.mode == "I;16":
            grey = _bytes_of_16_bits(np.asarray(self.image))
            return np.repeat(grey[:, :, None], 3, axis=2)
        if self.image.mode in ("LA", "RGBA"):
            layer = self.image.convert("RGBA")
            return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))
        return np.asarray(self.image.convert("RGB"))

    def alpha(self) -> "Pixels | None":
        """Return how opaque it is, (height, width) from 0 to 255; None where it has no such channel."""
        return np.asarray(self.image.getchannel("A")) if "A" in self.image.getbands() else None

    def padded(self, margins: tuple[int, int, int, int]) -> "Photograph":
        """Return it with empty margins: left, top, right, bottom in pixels."""
        left, top, right, bottom = margins
        width, height = self.size
        image = Image.new(self.image.mode, (left + width + right, top + height + bottom))
        image.paste(self.image, (left, top))
        image.info.update(self.image.info)
        return replace(self, image=image)

    def replaced(self, pixels: "Pixels", shown: "NDArray[np.bool_] | None" = None) -> Image.Image:
        """Return it with other pixels, in its own mode and with its own resolution and colour profile.

        Where `pixels` are what `self.pixels()` gave, its own stay to the last bit.

        Args:
            pixels: of the same size.
            shown: what was transparent and is to be seen from now on, (height, width); None is nothing.
        """
        changed = (pixels != self.pixels()).any(axis=2)
        if shown is not None:
            changed |= shown
        own = np.asarray(self.image).copy()
        own[changed] = self._in_own_mode(pixels, own, shown)[changed]
        image = Image.fromarray(own)
        image.info.update(self.image.info)
        return image

    def _in_own_mode(
        self, pixels: "Pixels", own: "NDArray[np.generic]", shown: "NDArray[np.bool_] | None"
    ) -> "NDArray[np.generic]":
        if self.image.mode == "RGB":
            return pixels
        if self.image.mode == "RGBA":
            colours = pixels
        else:
            grey = np.asarray(Image.fromarray(pixels).convert("L"))
            if self.image.mode == "L":
                return grey
            if self.image.mode == "I;16":
                return grey.astype(np.uint16) * 257
            colours = grey[:, :, None]
        alpha = own[:, :, -1] if shown is None else np.where(shown, 255, own[:, :, -1])
        return np.dstack([colours, alpha]).astype(np.uint8)


def read_photograph(source: str) -> Photograph:
    """Return the picture of a file, or of standard input for ``-``.

    It is turned upright as its camera meant it. Palettes, ink and other colour spaces become RGB, by
    the file's profile where inks have one.

    Raises:
        InputError: it cannot be read, is no picture, is cut off, has several frames, or would take too
            much memory.
    """
    if source == STANDARD_INPUT:
        if sys.stdin.isatty():
            raise InputError("picture: - is a terminal; send a picture through a pipe, or name a file")
        name, content = "standard input", sys.stdin.buffer.read()
    else:
        name = source
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise InputError(f"picture: {source} cannot be read; {error.strerror or error}") from error
    return photograph(content, name)


def photograph(content: bytes, name: str) -> Photograph:
    """Return the picture that a file's content holds; `name` is what to call it in messages."""
    with _reading(name), Image.open(BytesIO(content)) as opened:
        frames = getattr(opened, "n_frames", 1)
        if frames > 1 and opened.format != "MPO":  # cameras add a second view to their photographs
            raise InputError(f"picture: {name} has {frames} frames; one picture, such as its first frame as PNG")
        shortened = any(";16" in str(tile[3]) and opened.mode != "I;16" for tile in opened.tile)
        opened.load()
        info: dict[str | tuple[int, int], Any] = {
            key: opened.info[key] for key in ("dpi", "icc_profile") if opened.info.get(key)
        }
        image = _for_png(ImageOps.exif_transpose(opened), name)
    if opened.mode == "CMYK":
        info.pop("icc_profile", None)  # of the inks
    image.info = info
    return Photograph(name, image, sha256(content).hexdigest(), shortened)


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
        raise InputError(f"picture: {name} is too large; at most {most} million pixels") from error
    except UnidentifiedImageError as error:
        raise InputError(f"picture: {name}; no picture, or of a kind not known; PNG, JPEG or another usual") from error
    except Exception as error:  # decoders fed broken bytes raise nearly anything, struct.error to SyntaxError
        raise InputError(f"picture: {name} cannot be read; {str(error) or type(error).__name__}") from error


def _for_png(image: Image.Image, name: str) -> Image.Image:
    """Return a picture in a mode that PNGs hold, without loss where it has one."""
    if image.mode == "F":
        raise InputError(f"picture: {name} has floating-point pixels, whose range nobody knows; 8 or 16 bits")
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
    """Return a CMYK picture as sRGB, by its profile if it has a usable one."""
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


def _bytes_of_16_bits(values: "NDArray[np.generic]") -> "Pixels":
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
