"""Masks, boxes and margins, as users give them.

A mask is a boolean array, height × width, True where to fill. Boxes and margins are left, top, right,
bottom in pixels.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varcli.errors import InputError, UsageError
from varcli.images.decode import most_pixels
from varcli.images.editable import SourceImage, grey_levels
from varcli.images.png16 import Mask, to_8_bits

_HALF = 128


def grey_mask(given: SourceImage) -> Mask:
    """Mask of the white parts of an image; transparent parts count as black."""
    grey, alpha = to_8_bits(grey_levels(given.levels[:, :, : given.colours])), given.alpha()
    return (grey if alpha is None else grey.astype(np.uint32) * alpha // 255) >= _HALF


def transparent_mask(given: SourceImage) -> Mask:
    """Mask of the parts of an image that are more transparent than opaque.

    Raises:
        InputError: it has no alpha channel.
    """
    alpha = given.alpha()
    if alpha is None:
        raise InputError(f"--alpha needs an image with an alpha channel; {given.name} has none")
    return alpha < _HALF


def box_mask(box: tuple[int, int, int, int], size: tuple[int, int]) -> Mask:
    """Return a mask of an image of this width and height that is True inside the box."""
    left, top, right, bottom = box
    mask = np.zeros(size[::-1], bool)
    mask[top:bottom, left:right] = True
    return mask


def fitted_mask(mask: Mask, size: tuple[int, int], name: str, fit: bool) -> Mask:
    """Return the mask in an image's size, width and height.

    Raises:
        InputError: it has another size and is not to be fitted.
    """
    height, width = mask.shape
    if (width, height) == size:
        return mask
    if not fit:
        raise InputError(
            f"the mask must be of the image's size, {size[0]} × {size[1]} ({name} is {width} × {height}); "
            "--fit-mask resizes it"
        )
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(grey) >= _HALF


def check_mask_image(given: SourceImage, marks: Mask) -> str:
    """Return a warning about an image that is hardly a mask, empty if it may be one.

    Args:
        given: the image, whose brightness says what to fill.
        marks: what it marks.

    Raises:
        InputError: it has colours.
    """
    alpha = given.alpha()
    see_through = alpha is not None and bool((alpha < _HALF).any())
    advice = "; --alpha fills where it is transparent" if see_through else ""
    colours = to_8_bits(given.levels[:, :, : given.colours])
    if alpha is not None:
        colours = colours[alpha > 0]
    if np.mean(np.ptp(colours, axis=-1) > _COLOURED) > _FEW:
        raise InputError(f"the mask {given.name} has colours: a mask must be black, and white where to fill{advice}")
    greys = np.mean((colours > _DARK) & (colours < 255 - _DARK)) > _MANY
    share = marks.mean()
    if not greys and not (see_through and share > 1 / 2):
        return ""
    return f"{given.name} does not look like a mask: its brightness marks {share:.0%} of the image{advice}"


_COLOURED, _FEW = 32, 0.01
"""Least difference between the levels of a colour, and the share of pixels that may have one."""

_DARK, _MANY = 32, 0.25
"""Levels up to which a grey counts as black (and as white, from the other end), and the share that may be between."""


def check_mask(mask: Mask, name: str) -> None:
    """Raise InputError where a mask marks nothing, or everything."""
    white = "white, and grey from 128 on, is what to fill"
    if not mask.any():
        raise InputError(f"the mask {name} marks nothing: {white} (with --alpha: transparent)")
    if mask.all():
        raise InputError(f"the mask {name} marks the whole image ({white}): some of it must stay, or use `var sample`")


def parse_box(text: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return a box of an image of this size from ``l,t,r,b`` in pixels or percent.

    Raises:
        UsageError: it is no box, reaches beyond the image, or is empty or all of it.
    """
    left, top, right, bottom = _four("--box", text, size)
    width, height = size
    if not (left < right and top < bottom):
        raise UsageError(f"--box must be left,top,right,bottom with left < right and top < bottom (got {text})")
    if not (left >= 0 and right <= width and top >= 0 and bottom <= height):
        raise UsageError(f"--box must lie within the image of {width} × {height} pixels (got {text})")
    if (right - left, bottom - top) == size:
        raise UsageError(f"--box {text} is the whole image: some of it must stay, or use `var sample`")
    return left, top, right, bottom


def parse_margins(text: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return margins to add to an image of this size, from ``l,t,r,b`` in pixels or percent.

    Raises:
        UsageError: they are no margins, or all are 0.
    """
    margins = _four("--pad", text, size)
    if min(margins) < 0 or not any(margins):
        raise UsageError(f"--pad must be 0 or more on each side, and more than 0 on one (got {text})")
    _check_canvas("--pad", text, size[0] + margins[0] + margins[2], size[1] + margins[1] + margins[3])
    return margins


def parse_target(text: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the margins that bring an image of this size to ``WxH``, itself in the middle.

    Raises:
        UsageError: it is no size, or not larger than the image.
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--to must be width x height in pixels, such as 1024x256 (got {text})")
    width, height = map(int, parts)
    if width < size[0] or height < size[1] or (width, height) == size:
        raise UsageError(f"--to must be larger than the image's {size[0]}x{size[1]} (got {text})")
    _check_canvas("--to", text, width, height)
    across, down = width - size[0], height - size[1]
    return across // 2, down // 2, across - across // 2, down - down // 2


def _check_canvas(option: str, text: str, width: int, height: int) -> None:
    most = most_pixels()
    if width * height > most:
        raise UsageError(
            f"{option} {text} makes {width} × {height} pixels, and memory suffices for {most / 10**6:.0f} million"
        )


def _four(option: str, text: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return four lengths along x, y, x, y of an image of this size; a percentage is of its width or height."""
    parts = text.split(",")
    try:
        left, top, right, bottom = (
            round(float(part.strip()[:-1]) / 100 * whole) if part.strip().endswith("%") else int(part)
            for part, whole in zip(parts, size * 2, strict=True)
        )
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{option} must be left,top,right,bottom in pixels or percent, "
            f"such as 16,0,48,32 or 25%,0%,75%,50% (got {text})"
        ) from error
    return left, top, right, bottom


def marked(pixels: NDArray[np.uint8], mask: Mask) -> NDArray[np.uint8]:
    """Return an image (height, width, 3) with the masked part in magenta."""
    shown = pixels.copy()
    shown[mask] = (255, 0, 255)
    return shown
