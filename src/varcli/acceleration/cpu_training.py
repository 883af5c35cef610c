"""Training in bf16 on a CPU: unfused attention, and a GELU that torch.compile makes fast.

Torch's fused attention multiplies bf16 there no faster than float32. Two products and a softmax take half the time, but
keep the attention weights for the backward pass, where the fused one computes them again.

Shapes: B images, h heads of c channels, L tokens of all scales, l of those before the last scale.
"""

import math

import torch
from torch import Tensor, nn

from varcli.config import spans
from varcli.models.autoencoder import SpatialAttention
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import SelfAttention, Transformer

MOST_TOKENS = 512
"""Longest sequence for which attention weights are kept, h · L² values of 2 bytes an image and block."""


class ProductAttention:
    """Softmax(q·kᵀ)·v by two products, called as `scaled_dot_product_attention` is.

    Queries before the last scale and those of the last scale are computed separately: the former see the keys before it
    under the mask, the latter see all keys, so no mask is applied to them.
    """

    def __init__(self, last: int = 0) -> None:
        """Take where the last scale begins.

        Args:
            last: index of its first token; 0 where every token sees all.
        """
        self.last = last

    def __call__(
        self, q_BhLc: Tensor, k_BhLc: Tensor, v_BhLc: Tensor, *, attn_mask: Tensor | None = None, scale: float = 0
    ) -> Tensor:
        """Return (B, h, L, c), where L may also end before the last scale. Scores have the precision of the queries.

        Args:
            q_BhLc: queries.
            k_BhLc: keys.
            v_BhLc: values.
            attn_mask: what is added to the scores, (1, 1, L, L).
            scale: factor of the scores; 0 is 1/√c.
        """
        if scale != 1:
            q_BhLc = q_BhLc * (scale or 1 / math.sqrt(q_BhLc.shape[-1]))
        parts = []
        if self.last:
            before = slice(self.last)
            score_Bhll = q_BhLc[:, :, before] @ k_BhLc[:, :, before].mT
            if attn_mask is not None:
                score_Bhll = score_Bhll + attn_mask[..., before, before]
            parts.append(score_Bhll.softmax(-1) @ v_BhLc[:, :, before])
        if self.last < q_BhLc.shape[2]:
            score_BhlL = q_BhLc[:, :, self.last :] @ k_BhLc.mT
            parts.append(score_BhlL.softmax(-1) @ v_BhLc)
        return torch.cat(parts, 2)


def attend_by_products(model: Tokenizer | Transformer) -> None:
    """Have a model attend by products, where its sequences are not too long for memory."""
    parts = spans(model.config.sides)
    for module in model.modules():
        if isinstance(module, SelfAttention) and parts[-1].stop <= MOST_TOKENS:
            module.attend = ProductAttention(parts[-1].start)
        elif isinstance(module, SpatialAttention) and model.config.sides[-1] ** 2 <= MOST_TOKENS:
            module.attend = ProductAttention()


class SigmoidGelu(nn.Module):
    """GELU's tanh form as x·σ(2u), the same function; compiled, its exponential takes half the time of a tanh."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        wide = x.float()
        return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
