"""Visual prefix guidance: logits move away from those that a damaged prefix gives.

ℓ + γ (ℓ − ℓ_damaged), where ℓ are the logits of the class and ℓ_damaged those of the same class after a prefix in which
half of the tokens of each scale are replaced: what rests on the prefix is stressed. It takes one more row in the
transformer's batch, with keys and values of its own.

Source: VPG, arXiv 2605.30317. Differs: the paper was at hand in its abstract alone, and which tokens are replaced, by
what, and how many is chosen here.

Shapes: B images, l tokens of one scale, C codebook channels.
"""

from functools import lru_cache

import torch
from torch import Tensor

REPLACED = 0.5
"""Share of a scale's tokens that are replaced."""


def damaged(input_BlC: Tensor, share: float = REPLACED) -> Tensor:
    """Return what the transformer sees of a scale, (B, l, C), with a share of its tokens replaced by others of the map.

    The places are the same for all images, so that no image knows of its batch.
    """
    return input_BlC[:, origins(input_BlC.shape[1], share, input_BlC.device)]


@lru_cache(maxsize=64)
def origins(length: int, share: float, device: torch.device) -> Tensor:
    """Return from which place each token is taken, (l,): those to be replaced change places in a circle."""
    changed = torch.randperm(length, generator=torch.Generator().manual_seed(length))[: round(share * length)]
    origin_l = torch.arange(length)
    origin_l[changed] = changed.roll(1)
    return origin_l.to(device)
