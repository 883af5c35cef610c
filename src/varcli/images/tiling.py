"""Which squares of an image go through the model, in which order, and how they go there and back."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from varcli.images.masks import Mask, Numbers

if TYPE_CHECKING:
    from varcli.images.provenance import Pixels


CONTEXT = 2.0
"""Side of the square around a hole, as a multiple of the hole's larger side: what the model sees besides it."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A square of an image, in its pixels."""

    left: int
    top: int
    side: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, to index an array with."""
        return slice(self.top, self.top + self.side), slice(self.left, self.left + self.side)


def tile_side(mask: Mask, pixels: int, wanted: float | None = None) -> int:
    """Return the side of the squares that fill a mask.

    Never less than the model's own resolution, where the image is that large, and never more than
    the image's shorter side.

    Args:
        mask: of the whole image.
        pixels: the model's side.
        wanted: side to have if possible; None is the hole with its context.
    """
    left, top, right, bottom = bounds(mask)
    wanted = CONTEXT * max(right - left, bottom - top) if wanted is None else wanted
    return min(max(pixels, round(wanted)), *mask.shape)


def tiles(mask: Mask, side: int) -> Iterator[Tile]:
    """Yield squares that cover a mask together, each when those before it have been filled.

    One is enough where the hole fits in with some context. Others overlap by half, and the next is always that which
    knows most of itself: from the known outwards, and from the edges of a hole inwards.
    """
    left, top, right, bottom = bounds(mask)
    height, width = mask.shape
    corners = list(product(_starts(left, right, side, width), _starts(top, bottom, side, height)))
    waiting = [Tile(x, y, side) for x, y in corners]
    unknown = mask.copy()
    while unknown.any():
        holes = {region: int(unknown[region.slices].sum()) for region in waiting}
        waiting = [region for region in waiting if holes[region]]
        best = min(waiting, key=lambda region: holes[region])
        yield best
        unknown[best.slices] = False


def count_tiles(mask: Mask, side: int) -> int:
    """How many squares `tiles` yields."""
    return sum(1 for _ in tiles(mask, side))


def bounds(mask: Mask) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what a mask marks."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _starts(first: int, last: int, side: int, whole: int) -> list[int]:
    """Where squares along one axis of [0, whole) begin so that they cover [first, last) and some around it."""
    if 4 * (last - first) <= 3 * side or side == whole:
        return [min(max((first + last - side) // 2, 0), whole - side)]
    first, last = max(first - side // 2, 0), min(last + side // 2, whole)
    steps = -(-(last - first - side) // max(side // 2, 1))
    return [first + (last - first - side) * step // max(steps, 1) for step in range(steps + 1)]


# --- there and back --------------------------------------------------------------------------------


def shrunk(pixels: Numbers, side: int) -> Numbers:
    """Return a square (any, any, 3) of floats as (side, side, 3), by Lanczos; as it is where that is its size."""
    if len(pixels) == side:
        return pixels
    layers = [Image.fromarray(np.ascontiguousarray(pixels[:, :, channel])) for channel in range(3)]
    resized = [np.asarray(layer.resize((side, side), Image.Resampling.LANCZOS)) for layer in layers]
    return np.dstack(resized).clip(0, 255)


def shrunk_mask(mask: Mask, side: int) -> Mask:
    """Return a square mask as (side, side), True wherever any of a pixel's area is marked."""
    if len(mask) == side:
        return mask
    count = len(mask)
    first, last = np.arange(side) * count // side, -(-np.arange(1, side + 1) * count // side)
    rows = np.stack([mask[low:high].any(axis=0) for low, high in zip(first, last, strict=True)])
    return np.stack([rows[:, low:high].any(axis=1) for low, high in zip(first, last, strict=True)], axis=1)


def enlarged(pixels: "Pixels", side: int) -> "Pixels":
    """Return a square image at another size; as it is where that is its size."""
    if len(pixels) == side:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))
