"""Guidance by the coarser scales: the logits move away from what these already say, or from a damaged prefix.

Classifier-free guidance, by the class, is in `sampling/scale_model`.

Shapes: B images, l = s² tokens of one scale, C codebook channels, V codebook rows.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# --- scaled spatial guidance -----------------------------------------------------------------------


def guided(logits_BlV: Tensor, before_BlV: Tensor | None, beta: float) -> Tensor:
    """Return logits (B, l, V) that stress what is new in their scale: ℓ + β (ℓ - ℓ_prior).

    ℓ_prior are the logits of the scale before, enlarged.

    Args:
        logits_BlV: of a scale.
        before_BlV: of the scale before, as the model gave them; None at the first.
        beta: strength; 0 changes nothing.

    Source: SSG, arXiv 2602.05534. Differs: β is the same for all scales.
    """
    if beta == 0 or before_BlV is None:
        return logits_BlV
    return logits_BlV + beta * (logits_BlV - prior(before_BlV, round(logits_BlV.shape[1] ** 0.5)))


def prior(before_BlV: Tensor, side: int) -> Tensor:
    """Return the logits of a scale enlarged to another side, (B, side², V).

    The scale's own frequencies are kept exactly; those above them come from linear interpolation.
    """
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
    """Return the matrices that enlarge one axis of a map: float32 (side, small), (side, side) and (side, small).

    The first interpolates linearly. The second is the projection onto the lower frequencies of the discrete cosine
    transform. The third takes the small map to these frequencies exactly.
    """
    eye = torch.eye(small, dtype=torch.float64)[None]
    linear = F.interpolate(eye, size=side, mode="linear", align_corners=False)[0].T
    lowest = cosines(side)[:small]
    low = lowest.T @ lowest
    exact = lowest.T @ cosines(small) * math.sqrt(side / small)
    return linear.float().to(device), low.float().to(device), exact.float().to(device)


def cosines(side: int) -> Tensor:
    """Return the orthonormal discrete cosine transform (DCT-II) of an axis, (side, side): one frequency per row."""
    position, frequency = torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64)[:, None]
    matrix = torch.cos(math.pi * (position + 0.5) * frequency / side) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix


# --- visual prefix guidance ------------------------------------------------------------------------
#
# ℓ + γ (ℓ - ℓ_damaged): ℓ_damaged are the logits of the same class after a prefix in which half of the tokens of each
# scale are replaced, so that what rests on the prefix is stressed. They take one more row of the transformer's batch,
# with keys and values of its own.
#
# Source: VPG, arXiv 2605.30317. Differs: only the paper's abstract was at hand; which tokens are replaced, by what, and
# how many, is our choice.

REPLACED = 0.5
"""Share of a scale's tokens that are replaced."""


def damaged(input_BlC: Tensor, share: float = REPLACED) -> Tensor:
    """Return the input of a scale, (B, l, C), with a share of its tokens replaced by others of the same map.

    The positions are the same for all images, so that no image depends on its batch.
    """
    return input_BlC[:, origins(input_BlC.shape[1], share, input_BlC.device)]


@lru_cache(maxsize=64)
def origins(length: int, share: float, device: torch.device) -> Tensor:
    """Return the position that each token is taken from, (l,): those to be replaced are rotated among themselves."""
    changed = torch.randperm(length, generator=torch.Generator().manual_seed(length))[: round(share * length)]
    origin_l = torch.arange(length)
    origin_l[changed] = changed.roll(1)
    return origin_l.to(device)
