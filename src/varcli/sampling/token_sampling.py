"""Sampling tokens, each image with a generator of its own, so that no image depends on its batch.

Shapes: B images, l tokens of one scale, V codebook rows, K tokens that the filters look at (V or top-k).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that survive top-k and top-p, best first."""

    logits: Tensor
    """Their logits, (B, l, K); -inf where top-p dropped the token."""
    order: Tensor
    """Their codebook rows, (B, l, K)."""


def generators(seeds: Sequence[int], labels: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per image, a function of its seed and its class alone.

    The class takes part because images of different classes that share a seed would otherwise share
    all their random numbers, which costs quality over a set of classes. The hash makes seeds beyond
    32 bits count, of which the generator itself would only see the lower half.
    """
    found = []
    for seed, label in zip(seeds, labels, strict=True):
        digest = hashlib.blake2b(f"{seed} {label}".encode(), digest_size=4).digest()
        found.append(torch.Generator().manual_seed(int.from_bytes(digest, "little")))
    return found


def uniforms(sources: Sequence[torch.Generator], length: int) -> Tensor:
    """Return the next `length` numbers in [0, 1) of each image, (B, l), on the CPU."""
    return torch.stack([torch.rand(length, generator=source) for source in sources])


def gumbels(sources: Sequence[torch.Generator], length: int, count: int) -> Tensor:
    """Return the next l × count standard Gumbel numbers of each image, (B, l, count), on the CPU."""
    noise = [torch.empty(length, count).exponential_(generator=source) for source in sources]
    return torch.stack(noise).log_().neg_()


def candidates(logits_BlV: Tensor, top_k: int, top_p: float, temperature: float = 1.0) -> Candidates:
    """Return the tokens left by top-k and, within them, by top-p; 0 switches a filter off.

    Top-p drops the worst tokens whose probabilities, summed from the smallest up, do not exceed
    1 - top_p; the best token always stays. Logits are divided by the temperature before.
    """
    if temperature != 1:
        logits_BlV = logits_BlV / temperature
    count = min(top_k, logits_BlV.shape[-1]) or logits_BlV.shape[-1]
    logits_BlK, order_BlK = best(logits_BlV, count)
    if top_p > 0:
        rising_BlK = logits_BlK.flip(-1).softmax(-1).cumsum(-1)
        dropped_BlK = (rising_BlK <= 1 - top_p).flip(-1)
        dropped_BlK[..., :1].fill_(False)
        logits_BlK = logits_BlK.masked_fill(dropped_BlK, -torch.inf)
    return Candidates(logits_BlK, order_BlK)


def best(logits_BlV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest float32 logits, best first, and their codebook rows, (B, l, K) each; NaN comes before all.

    On x86 NumPy's vectorized selection and sort of integers are faster than torch's of floats with indices, three times
    with AVX-512. So each logit and its index are packed into one integer of the same order; NaN has none.
    """
    vectorized = logits_BlV.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if not vectorized or logits_BlV.sum().isnan():
        return logits_BlV.topk(count, dim=-1)
    bits_BlV = (logits_BlV + 0.0).view(torch.int32)  # -0 becomes 0
    rising_BlV = bits_BlV ^ ((bits_BlV >> 31) & 0x7FFFFFFF)  # negative floats are stored with their magnitude
    size = logits_BlV.shape[-1]
    from_behind_V = torch.arange(size - 1, -1, -1)  # of equal logits the first is the better
    key_BlV = ((rising_BlV.long() << 32) | from_behind_V).numpy()
    key_BlV.partition(size - count, axis=-1)
    key_BlK = np.sort(key_BlV[..., size - count :], axis=-1)
    order_BlK = (size - 1) - (torch.from_numpy(key_BlK).flip(-1) & 0xFFFFFFFF)
    return logits_BlV.gather(-1, order_BlK), order_BlK


def sample_tokens(found: Candidates, u_Bl: Tensor) -> Tensor:
    """Return one token per position, (B, l), by the inverse of the cumulative distribution at u in [0, 1)."""
    total_BlK = found.logits.softmax(-1).cumsum(-1)
    # u times the rounded total may equal the total, which would point beyond the last candidate.
    last_Bl = found.logits.isfinite().sum(-1) - 1
    target_Bl = u_Bl.to(total_BlK) * total_BlK[..., -1]
    rank_Bl = torch.searchsorted(total_BlK, target_Bl.unsqueeze(-1), right=True).squeeze(-1).minimum(last_Bl)
    return found.order.gather(-1, rank_Bl.unsqueeze(-1)).squeeze(-1)


def gumbel_softmax(found: Candidates, noise_BlK: Tensor, ratio: float) -> Tensor:
    """Return weights that sum to 1 over the candidates, (B, l, K): the relaxed draw of `smooth`.

    Args:
        found: what the filters left.
        noise_BlK: standard Gumbel numbers.
        ratio: k/(K-1), how far the scale lies between the first and the last.

    Source: the Gumbel-softmax trick (Jang et al. 2017) with the sharpening schedule of VAR's authors.
    """
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return ((found.logits * (1 + ratio) + noise_BlK.to(found.logits)) / temperature).softmax(-1)
