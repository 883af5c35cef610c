"""Tiles: which squares of an image go through the model, in which order, and how they are resized."""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varcli.images.png16 import Mask, Numbers

if TYPE_CHECKING:
    from varcli.images.provenance import Pixels


CONTEXT = 2.0
"""Side of the square around a hole, as a multiple of the hole's size: the context that the model sees."""

LARGEST = 4
"""Side of the largest square, as a multiple of the model's: with larger ones the fill has no texture."""

_LENGTH = 1.5
"""Largest ratio of length to thickness of a hole that is filled at once; a disc is 1.41 times its inner square."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A square of an image, in its pixels."""

    left: int
    top: int
    side: int
    group: int
    """Number of the group of holes that it fills."""

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, to index an array with."""
        return slice(self.top, self.top + self.side), slice(self.left, self.left + self.side)


@dataclass(frozen=True, slots=True)
class Plan:
    """The squares that together fill a mask."""

    waves: list[list[Tile]]
    """Squares of one wave do not overlap; each wave comes after those before it have been filled."""
    padding: tuple[tuple[int, int], tuple[int, int]]
    """Mirrored padding of a narrow image, above and below, left and right; squares have coordinates with it."""
    mask: Mask
    """What to fill, without the padding."""
    groups: NDArray[np.int32]
    """Number of the group of holes in each cell of the padded image, 0 for none."""
    cell: int
    """Side of the cells in pixels."""

    @property
    def count(self) -> int:
        """Number of squares."""
        return sum(map(len, self.waves))

    def fills(self, tile: Tile) -> Mask:
        """Which pixels of a square belong to the cells of its holes; other holes in it have squares of their own."""
        return _of_group(self.groups, tile.group, self.cell, *tile.slices)

    def padded(self, levels: NDArray[Any]) -> NDArray[Any]:
        """Return a copy of an image, or a mask, with the padding around it."""
        return np.pad(levels, [*self.padding, (0, 0)][: levels.ndim], "symmetric")

    def cropped(self, levels: NDArray[Any]) -> NDArray[Any]:
        """Return an image without the padding."""
        (top, _), (left, _) = self.padding
        height, width = self.mask.shape
        return levels[top : top + height, left : left + width]


def plan_squares(mask: Mask, pixels: int, feather: int = 0) -> Plan:
    """Return squares for each group of holes near each other, of a size that follows the size of these holes.

    A square has the model's own resolution, or as many pixels as the hole and its context need, up to `LARGEST`
    times that. A hole that is longer than thick, or larger than that, takes several overlapping squares. The time
    this takes grows with the number of holes and squares, not with its square.

    Args:
        mask: of the whole image, some of it True.
        pixels: the model's side.
        feather: pixels around each hole that must have room in its square.
    """
    smallest = min(pixels, max(mask.shape))
    spare = [max(smallest - size, 0) for size in mask.shape]
    padding = ((spare[0] // 2, -(-spare[0] // 2)), (spare[1] // 2, -(-spare[1] // 2)))
    padded = np.pad(mask, padding)
    cell = max(pixels // 4, 1)
    groups, boxes = _hole_groups(_reduced(padded, cell))
    waves: list[list[Tile]] = []
    latest = np.zeros_like(groups)  # of each cell, the first wave in which its last square has been filled
    for group, (rows, columns) in enumerate(boxes, 1):
        top, left = rows.start * cell, columns.start * cell
        own = padded[top : rows.stop * cell, left : columns.stop * cell]
        own = own & _of_group(groups, group, cell, slice(top, top + len(own)), slice(left, left + own.shape[1]))
        x, y, right, bottom = bounds(own)
        own = own[y:bottom, x:right]
        side = max(smallest, min(square_side(own, pixels, feather), *padded.shape))
        for tile in _squares(own, left + x, top + y, side, padded.shape, group):
            down, across = (slice(part.start // cell, -(-part.stop // cell)) for part in tile.slices)
            wave = int(latest[down, across].max())
            latest[down, across] = wave + 1
            if wave == len(waves):
                waves.append([])
            waves[wave].append(tile)
    return Plan(waves, padding, mask, groups, cell)


def plan_whole(mask: Mask) -> Plan:
    """Return squares of the image's shorter side, one after another, as the released rule has them."""
    left, top, right, bottom = bounds(mask)
    own = mask[top:bottom, left:right]
    found = [[tile] for tile in _squares(own, left, top, min(mask.shape), mask.shape, 1)]
    return Plan(found, ((0, 0), (0, 0)), mask, np.ones((1, 1), np.int32), max(mask.shape))


def square_side(hole: Mask, pixels: int, feather: int = 0) -> int:
    """Return the side of the squares that fill a hole, cut out close to it, if the image is large enough."""
    size = float(max(hole.shape))
    if CONTEXT * size > pixels:
        size = min(size, _LENGTH * _thickness(hole, LARGEST * pixels))
    return min(max(pixels, round(CONTEXT * size), round(size) + 2 * feather), LARGEST * pixels)


def bounds(mask: Mask) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what a mask marks."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _reduced(mask: Mask, cell: int) -> Mask:
    """Which cells of a mask have a mark."""
    height, width = mask.shape
    rows = np.logical_or.reduceat(mask, range(0, height, cell), axis=0)
    return np.logical_or.reduceat(rows, range(0, width, cell), axis=1)


def _hole_groups(cells: Mask) -> tuple[NDArray[np.int32], list[tuple[slice, slice]]]:
    """Number the groups of marked cells that touch each other, from 1; also return the rows and columns of each."""
    groups, boxes = np.zeros(cells.shape, np.int32), []
    marked = list(zip(*(axis.tolist() for axis in np.nonzero(cells)), strict=True))
    waiting = set(marked)
    for first in marked:
        if first not in waiting:
            continue
        waiting.remove(first)
        group = [first]
        for row, column in group:  # it grows meanwhile
            for near in ((row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                if near in waiting:
                    waiting.remove(near)
                    group.append(near)
        rows, columns = zip(*group, strict=True)
        boxes.append((slice(int(min(rows)), int(max(rows)) + 1), slice(int(min(columns)), int(max(columns)) + 1)))
        groups[rows, columns] = len(boxes)
    return groups, boxes


def _of_group(groups: NDArray[np.int32], group: int, cell: int, rows: slice, columns: slice) -> Mask:
    """Which pixels of an area lie in the cells of a group."""
    down, across = (np.arange(part.start, part.stop) // cell for part in (rows, columns))
    return groups[np.ix_(down, across)] == group


def _thickness(hole: Mask, most: int) -> int:
    """Return the side of the largest square in a hole, at most `most`."""
    sums = np.pad(hole, ((1, 0), (1, 0))).cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
    least, most = 1, min(most, *hole.shape)
    while least < most:
        side = (least + most + 1) // 2
        inside = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
        least, most = (side, most) if (inside == side**2).any() else (least, side - 1)
    return least


def _squares(hole: Mask, left: int, top: int, side: int, shape: tuple[int, ...], group: int) -> Iterator[Tile]:
    """Yield squares that cover a hole together, each when those before it have been filled.

    One is enough where the hole fits in with some context. Others overlap by half, and the next is always the one
    with the most known pixels: from the edges of a hole inwards.

    Args:
        hole: cut out close to it.
        left: where it lies in the image.
        top: the same.
        side: of the squares.
        shape: height and width of the image.
        group: the hole's number.
    """
    lefts = _starts(left, left + hole.shape[1], side, shape[1])
    tops = _starts(top, top + hole.shape[0], side, shape[0])
    unknown = hole.copy()

    def part(column: int, row: int) -> Mask:
        x, y = lefts[column] - left, tops[row] - top
        return unknown[max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)]

    counts = {(i, j): int(part(i, j).sum()) for i in range(len(lefts)) for j in range(len(tops))}
    waiting = [(count, place) for place, count in counts.items() if count]
    heapify(waiting)
    while waiting:
        count, (column, row) = heappop(waiting)
        if count != counts[column, row]:
            continue  # more of it has been filled since, and it waits at another place too
        yield Tile(lefts[column], tops[row], side, group)
        part(column, row)[:] = False
        for near in ((column + i, row + j) for i in _NEAR for j in _NEAR):
            count = int(part(*near).sum()) if near in counts else 0
            if near in counts and count != counts[near]:
                counts[near] = count
                if count:
                    heappush(waiting, (count, near))


_NEAR = (-2, -1, 0, 1, 2)
"""Offsets of squares along an axis that may overlap."""


def _starts(first: int, last: int, side: int, whole: int) -> list[int]:
    """Where squares along one axis of [0, whole) begin so that they cover [first, last) and some around it."""
    if 4 * (last - first) <= 3 * side or side == whole:
        return [min(max((first + last - side) // 2, 0), whole - side)]
    first, last = max(first - side // 2, 0), min(last + side // 2, whole)
    steps = -(-(last - first - side) // max(side // 2, 1))
    return [first + (last - first - side) * step // max(steps, 1) for step in range(steps + 1)]


# --- resizing --------------------------------------------------------------------------------------


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
