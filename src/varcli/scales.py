"""Sides of the token maps and what follows from them. No torch here.

A picture is K square token maps of sides s_1 … s_K; all maps side by side make one sequence of
L = Σ s_k² tokens, coarse to fine.
"""

from collections.abc import Sequence
from itertools import pairwise

from varcli.errors import InputError

GRID_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
GRID_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
GRID_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


def sequence_length(sides: Sequence[int]) -> int:
    """Return L, the number of tokens of all scales together."""
    return sum(side * side for side in sides)


def spans(sides: Sequence[int]) -> list[slice]:
    """Return for each scale the slice of the sequence its tokens take."""
    found, start = [], 0
    for side in sides:
        found.append(slice(start, start + side * side))
        start += side * side
    return found


def progress_ratio(scale: int, count: int) -> float:
    """Return k/(K-1), how far scale k (0-based) lies between the first and the last; 0 if K = 1."""
    return scale / max(count - 1, 1)


def check_sides(sides: Sequence[int]) -> None:
    """Raise ValueError unless sides begin at 1 and grow strictly."""
    growing = all(a < b for a, b in pairwise(sides))
    if not sides or sides[0] != 1 or not growing:
        raise ValueError(f"sides: {','.join(map(str, sides))}; they begin with 1 and grow, e.g. 1,2,3,4,6,8")


def sides_of_length(length: int) -> tuple[int, ...]:
    """Return the published grid that has this many tokens.

    Raises:
        InputError: no published grid has this length, so the sides must be given.
    """
    for grid in (GRID_256, GRID_512, GRID_1024):
        if sequence_length(grid) == length:
            return grid
    raise InputError(f"token count: {length} belongs to no published grid; give the sides with --sides 1,2,3,…")
