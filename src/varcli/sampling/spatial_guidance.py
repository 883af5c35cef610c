"""Scaled spatial guidance: a scale's logits move away from what the scale before it already says.

ℓ + β (ℓ − ℓ_prior), where ℓ_prior are the logits of the scale before, enlarged: its own frequencies are kept exactly,
and those above them are what linear interpolation adds.

Source: SSG, arXiv 2602.05534. Differs: β is the same for all scales.

Shapes: B images, l = s² tokens of one scale, V codebook rows.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def guided(logits_BlV: Tensor, before_BlV: Tensor | None, beta: float) -> Tensor:
    """Return logits (B, l, V) that say more of what is new in their scale.

    Args:
        logits_BlV: of a scale.
        before_BlV: of the scale before, as the model gave them; None at the first.
        beta: strength; 0 changes nothing.
    """
    if beta == 0 or before_BlV is None:
        return logits_BlV
    return logits_BlV + beta * (logits_BlV - prior(before_BlV, round(logits_BlV.shape[1] ** 0.5)))


def prior(before_BlV: Tensor, side: int) -> Tensor:
    """Return the logits of a scale enlarged to another side, (B, side², V)."""
    small = round(before_BlV.shape[1] ** 0.5)
    linear, low, exact = enlarging(small, side, before_BlV.device)
    map_BssV = before_BlV.unflatten(1, (small, small))
    interpolated = _both_axes(linear, map_BssV)
    return (interpolated - _both_axes(low, interpolated) + _both_axes(exact, map_BssV)).flatten(1, 2)


def _both_axes(matrix: Tensor, map_BssV: Tensor) -> Tensor:
    """Apply a matrix along rows and columns."""
    return torch.einsum("ij,kl,bjlv->bikv", matrix, matrix, map_BssV)


@lru_cache(maxsize=64)
def enlarging(small: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return what enlarges one axis of a map: float32 matrices (side, small), (side, side) and (side, small).

    Linear interpolation, the part of an axis that lies in the lower frequencies of the discrete cosine transform, and
    the small map carried over in these frequencies alone.
    """
    eye = torch.eye(small, dtype=torch.float64)[None]
    linear = F.interpolate(eye, size=side, mode="linear", align_corners=False)[0].T
    lowest = cosines(side)[:small]
    low = lowest.T @ lowest
    exact = lowest.T @ cosines(small) * math.sqrt(side / small)
    return linear.float().to(device), low.float().to(device), exact.float().to(device)


def cosines(side: int) -> Tensor:
    """Return the orthonormal discrete cosine transform (DCT-II) of an axis, (side, side): a frequency a row."""
    place, frequency = torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64)[:, None]
    matrix = torch.cos(math.pi * (place + 0.5) * frequency / side) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix
