"""Training in bf16 on a CPU: attention by plain products, and a GELU that torch.compile makes fast.

Torch's fused attention multiplies bf16 there no faster than float32. Two products and a softmax take half the time, and
keep the attention weights (B, h, l, L) in bf16 for the backward pass, which torch's computes again.
"""

import math

import torch
from torch import Tensor, nn

from varcli.models.autoencoder import SpatialAttention
from varcli.models.transformer import SelfAttention


class ProductAttention:
    """Attention in two parts of the tokens, called as `scaled_dot_product_attention` is."""

    def __init__(self, last: int = 0) -> None:
        """Take where the last scale begins.

        Args:
            last: index of the last scale's first token. Tokens from it on see all tokens, those before it only one
                another, as far as the bias lets them.
        """
        self.last = last

    def __call__(
        self,
        q_BhLc: Tensor,
        k_BhLc: Tensor,
        v_BhLc: Tensor,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Return (B, h, L, c), of all tokens or of those before the last scale. Scores are rounded to bf16."""
        q_BhLc = q_BhLc * (1 / math.sqrt(q_BhLc.shape[-1]) if scale is None else scale)
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


def attend_by_products(model: nn.Module, last: int) -> None:
    """Have a tokenizer or a transformer, whose last scale begins at token `last`, attend by products."""
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attend = ProductAttention(last)
        elif isinstance(module, SpatialAttention):
            module.attend = ProductAttention()


class SigmoidGelu(nn.Module):
    """GELU's tanh form as x·σ(2u), the same function; compiled, its exponential takes half the time of a tanh."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        wide = x.float()
        return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
