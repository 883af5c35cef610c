"""The VAR transformer: GPT-2 style blocks conditioned by adaptive normalization (paper, section 3.1).

Shapes: B pictures, l tokens of one scale, L tokens of all scales, D width, C codebook channels,
V codebook rows. Module names are those inside the released checkpoint files.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.config import TransformerConfig
from varcli.models.attention import KeyValueCache, SelfAttention
from varcli.models.layers import StochasticDepth
from varcli.scales import spans

LABEL_DROP = 0.1
"""Probability that training shows "no class" instead of the label, so that guidance has something to guide from."""


class FeedForward(nn.Module):
    """Linear to four times the width, GELU (tanh form), linear back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BlD: Tensor) -> Tensor:
        """Return (B, l, D)."""
        return self.fc2(self.gelu(self.fc1(x_BlD)))


class Modulation(nn.Sequential):
    """SiLU and a linear map, from the class embedding to some vectors of the same width."""

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, vectors * width))
        self.vectors = vectors

    @property
    def linear(self) -> nn.Linear:
        """Return the linear map."""
        return cast("nn.Linear", self[1])

    def forward(self, class_BD: Tensor) -> Tensor:
        """Return the vectors, (B, 1, vectors, D)."""
        return self.linear(F.silu(class_BD)).unflatten(1, (1, self.vectors, -1))


def normalize(x_BlD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
    """Return LN(x)·(1 + scale) + shift, the layer norm without weights of its own."""
    return torch.addcmul(shift_B1D, F.layer_norm(x_BlD, x_BlD.shape[-1:], eps=1e-6), 1 + scale_B1D)


class Block(nn.Module):
    """Attention and feed-forward, each gated, scaled and shifted by the class."""

    def __init__(self, config: TransformerConfig, drop: float) -> None:
        super().__init__()
        width = config.width
        self.attn = SelfAttention(width)
        self.ffn = FeedForward(width)
        self.drop_path = StochasticDepth(drop)
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = Modulation(width, 6)

    def modulate(self, class_BD: Tensor, shared_B16D: Tensor | None) -> Tensor:
        """Return γ1, γ2, scale1, scale2, shift1, shift2 of this block as (B, 1, 6, D)."""
        if shared_B16D is not None:
            return shared_B16D + self.ada_gss
        return self.ada_lin(class_BD)

    def forward(
        self, x_BlD: Tensor, ada_B16D: Tensor, block: int, bias_11LL: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Return the residual stream after this block, (B, l, D)."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = ada_B16D.unbind(2)
        h_BlD = self.attn(normalize(x_BlD, scale1, shift1), block, bias_11LL, cache)
        x_BlD = torch.addcmul(x_BlD, self.drop_path(h_BlD), gamma1)
        h_BlD = self.ffn(normalize(x_BlD, scale2, shift2))
        return torch.addcmul(x_BlD, self.drop_path(h_BlD), gamma2)


class FinalNorm(nn.Module):
    """The modulated normalization before the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = Modulation(width, 2)

    def forward(self, x_BlD: Tensor, class_BD: Tensor) -> Tensor:
        """Return (B, l, D)."""
        scale, shift = self.ada_lin(class_BD).unbind(2)
        return normalize(x_BlD, scale, shift)


class Transformer(nn.Module):
    """Predicts each token map from the class and all coarser maps, equation 4: p(r_k | r_1 … r_{k-1})."""

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, length = config.width, config.length
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, length, width))
        self.word_embed = nn.Linear(config.codebook_width, width)
        self.class_emb = nn.Embedding(config.class_count + 1, width)
        self.lvl_embed = nn.Embedding(len(config.sides), width)
        if config.shared_adaln:
            self.shared_ada_lin = Modulation(width, 6)
        drops = [0.1 * config.depth / 24 * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, drop) for drop in drops)
        self.head_nm = FinalNorm(width)
        self.head = nn.Linear(width, config.codebook_size)
        level_L = torch.cat([torch.full((side * side,), k) for k, side in enumerate(config.sides)])
        self.register_buffer("lvl_1L", level_L.view(1, length))
        self.register_buffer("attn_bias_for_masking", block_causal_bias(level_L))

    def drop_labels(self, label_B: Tensor) -> Tensor:
        """Return labels of which about a tenth became "no class", drawn from torch's global generator."""
        dropped_B = torch.rand(label_B.shape[0], device=label_B.device) < LABEL_DROP
        return label_B.masked_fill(dropped_B, self.config.null_class)

    def modulations(self, class_BD: Tensor) -> list[Tensor]:
        """Return each block's (B, 1, 6, D). They depend on the class alone, so once per picture is enough."""
        shared_B16D = self.shared_ada_lin(class_BD) if self.config.shared_adaln else None
        return [block.modulate(class_BD, shared_B16D) for block in cast("Iterable[Block]", self.blocks)]

    def scale_input(self, scale: int, class_BD: Tensor, input_BlC: Tensor | None) -> Tensor:
        """Return the residual stream that enters the blocks for one scale, (B, l, D)."""
        span = spans(self.config.sides)[scale]
        place_1lD = self.lvl_embed.weight[scale] + self.pos_1LC[:, span]
        if input_BlC is None:
            return class_BD.unsqueeze(1) + self.pos_start + place_1lD
        return self.word_embed(input_BlC) + place_1lD

    def step(self, x_BlD: Tensor, modulations: list[Tensor], cache: KeyValueCache) -> Tensor:
        """Return the residual stream of one scale after all blocks, having stored its keys and values."""
        for i, (block, ada_B16D) in enumerate(zip(self.blocks, modulations, strict=True)):
            x_BlD = block(x_BlD, ada_B16D, i, None, cache)
        cache.advance(x_BlD.shape[1])
        return x_BlD

    def forward(self, label_B: Tensor, input_BLC: Tensor) -> Tensor:
        """Return logits (B, L, V) of all scales at once, from the true coarser tokens.

        Args:
            label_B: rows of the class table.
            input_BLC: `Quantizer.teacher_input`, (B, L - 1, C).
        """
        class_BD = self.class_emb(label_B)
        first_B1D = class_BD.unsqueeze(1) + self.pos_start
        x_BLD = torch.cat([first_B1D.to(input_BLC.dtype), self.word_embed(input_BLC)], dim=1)
        x_BLD = x_BLD + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        for i, (block, ada_B16D) in enumerate(zip(self.blocks, self.modulations(class_BD), strict=True)):
            x_BLD = block(x_BLD, ada_B16D, i, self.attn_bias_for_masking, None)
        return self.head(self.head_nm(x_BLD, class_BD))


def block_causal_bias(level_L: Tensor) -> Tensor:
    """Return the bias (1, 1, L, L) that lets a token see its own and coarser scales: 0 there, -inf elsewhere."""
    visible_LL = level_L[:, None] >= level_L[None, :]
    return torch.where(visible_LL, 0.0, -torch.inf)[None, None]
