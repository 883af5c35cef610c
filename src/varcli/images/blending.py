"""Blending old and new pixels: feathering, level matching, and filling of unknown pixels.

Shapes are written out: masks and weights are (height, width), pixels (height, width, 3).
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varcli.images.png16 import Levels, Mask, Numbers

_KNOWN_SHARE = 0.2
"""Fraction of a cell's pixels; with fewer known ones the cell counts as unknown."""


def feather_mask(mask: Mask, feather: int) -> Numbers:
    """How much of the new shows: 1 in the mask, falling to 0 within `feather` pixels outside of it.

    The distance is the larger of those in both directions, so the range is exact: 0 beyond it.
    """
    grown = _box_sums(mask, (feather + 1) // 2) > 0
    return (_box_sums(grown, feather // 2) / (2 * (feather // 2) + 1) ** 2).astype(np.float32)


def _box_sums(mask: Mask, radius: int) -> NDArray[np.int64]:
    """Count the marks in the square of 2·radius + 1 pixels around each pixel; edges are repeated beyond the image."""
    sums = mask.astype(np.int64)
    for axis in (0, 1):
        total = np.cumsum(np.pad(sums, [(radius + 1, radius) if i == axis else (0, 0) for i in (0, 1)], "edge"), axis)
        count, width = sums.shape[axis], 2 * radius + 1
        sums = np.take(total, range(width, width + count), axis) - np.take(total, range(count), axis)
    return sums


def pull_push_fill(pixels: Numbers, known: Mask) -> Numbers:
    """Return pixels (height, width, channels) whose unknown ones continue the known around them, smoothly.

    They depend on the known ones alone, and are grey where there are none. Each unknown pixel takes the mean over
    the smallest block around it with known pixels.

    Source: the pull-push algorithm (Gortler et al. 1996, section 3.4).
    """
    if not known.any():
        return np.full_like(pixels, 127.5)
    if known.all():
        return pixels
    height, width = known.shape
    edges = ((0, height % 2), (0, width % 2))
    weight = np.pad(known.astype(np.float32), edges)
    colour = np.pad(pixels * known[:, :, None], (*edges, (0, 0))).astype(np.float32)
    total = _quarter(weight)
    mean = (_quarter(colour) / np.maximum(total, 1)[:, :, None]).astype(np.float32)
    coarse = pull_push_fill(mean, total > 0)
    layers = [
        Image.fromarray(coarse[:, :, channel]).resize(weight.shape[::-1], Image.Resampling.BILINEAR)
        for channel in range(coarse.shape[2])
    ]
    smooth = np.dstack([np.asarray(layer) for layer in layers])[:height, :width]
    return np.where(known[:, :, None], pixels, smooth).astype(np.float32)


def _quarter(values: Numbers) -> Numbers:
    """Return the sums over blocks of 2 × 2."""
    return values[::2, ::2] + values[1::2, ::2] + values[::2, 1::2] + values[1::2, 1::2]


def match_levels(given: Levels, made: Levels, hole: Mask, cells: int) -> Levels:
    """Match the levels of new pixels to those of the old around a hole, less and less further inside.

    The difference where the old is known is averaged over cells, continued smoothly into the hole, where it falls to
    1/e within two cells, and added.

    Args:
        given: a square image, unknown in the hole.
        made: the new one, which covers all of it, of as many bits.
        hole: what is unknown.
        cells: how many along a side.

    Source: the membrane of Poisson image editing (Pérez et al. 2003), coarse and fading.
    """
    known = (~hole).astype(np.float32)
    share = _resized_levels(known, cells, Image.Resampling.BOX)
    sums = _resized_levels((given.astype(np.float32) - made) * known[:, :, None], cells, Image.Resampling.BOX)
    inside = share < _KNOWN_SHARE
    if inside.all():
        return made
    level = pull_push_fill((sums / np.maximum(share, _KNOWN_SHARE)[:, :, None]).astype(np.float32), ~inside)
    level *= np.exp(-_depth(inside) / 2)[:, :, None]
    smooth = _resized_levels(level, len(given), Image.Resampling.BICUBIC)
    return (made + smooth).clip(0, np.iinfo(made.dtype).max).round().astype(made.dtype)


def _resized_levels(values: Numbers, side: int, how: Image.Resampling) -> Numbers:
    """Return a square of numbers, with or without channels, at another size."""
    if values.ndim == 2:
        return np.asarray(Image.fromarray(values).resize((side, side), how))
    return np.dstack(
        [_resized_levels(np.ascontiguousarray(values[:, :, i]), side, how) for i in range(values.shape[2])]
    )


def _depth(inside: Mask) -> Numbers:
    """Number of cells between each cell and the known ones, 0 for those beside them."""
    depth = np.zeros(inside.shape, np.float32)
    while inside.any():
        inside = _box_sums(~inside, 1) == 0
        depth += inside
    return depth


def tinted(pixels: Levels, share: Numbers) -> Levels:
    """Return an image of 8 bits in grey, tinted blue where `share` (height, width) is 0, and orange where it is 1."""
    grey = pixels.mean(axis=2, keepdims=True)
    strength = 0.2 + 0.5 * np.abs(2 * share - 1)[:, :, None]
    color = _BLUE + (_ORANGE - _BLUE) * share[:, :, None]
    return (grey * (1 - strength) + color * strength).round().astype(np.uint8)


_BLUE, _ORANGE = np.array([0, 114, 178]), np.array([213, 94, 0])
"""Of the palette of `charts`, which colour-blind people can distinguish."""
