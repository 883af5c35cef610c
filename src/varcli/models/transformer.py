"""The VAR transformer: GPT-2 style blocks conditioned by adaptive normalization (paper, section 3.1).

Shapes: B images, L tokens of all scales (l of one), D channels, H heads of K channels, C codebook channels,
V codebook size.
"""

import math
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.config import HEAD_WIDTH, TransformerConfig, spans


class KeyValueCache:
    """Keys and values of all blocks, allocated once for the whole sequence of a batch."""

    kv: list[Tensor]
    """Of each block the keys and the values, (2, B, h, L, c)."""

    def __init__(self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.depth, 2, batch, config.heads, config.length, HEAD_WIDTH)
        self.kv = list(torch.empty(shape, device=device, dtype=dtype))
        self.filled = 0

    def until(self, block: int, end: int) -> Tensor:
        """A view of a block's keys and values of the first `end` tokens, to read or to write: (2, B, h, end, c)."""
        return self.kv[block][:, :, :, :end]

    def append(self, block: int, k_Bhlc: Tensor, v_Bhlc: Tensor) -> tuple[Tensor, Tensor]:
        """Store one block's keys and values of a scale; return those of all scales so far, (B, h, L, c) each."""
        k_BhLc, v_BhLc = self.until(block, self.filled + k_Bhlc.shape[2])
        k_BhLc[:, :, self.filled :] = k_Bhlc
        v_BhLc[:, :, self.filled :] = v_Bhlc
        return k_BhLc, v_BhLc

    def advance(self, count: int) -> None:
        """Note that every block has stored `count` more tokens."""
        self.filled += count

    def first_rows(self, count: int) -> "KeyValueCache":
        """Return the part of the first `count` rows of the batch."""
        part = copy(self)
        part.kv = [kv_2BhLc[:, :count] for kv_2BhLc in self.kv]
        return part

    def halve(self, start: int, end: int) -> None:
        """Drop every other token from `start` to `end`; the remaining ones begin at `start`."""
        for kv_2BhLc in self.kv:
            left_2Bhlc = kv_2BhLc[:, :, :, start:end:2].clone()
            kv_2BhLc[:, :, :, start : start + left_2Bhlc.shape[3]] = left_2Bhlc


class SelfAttention(nn.Module):
    """Multi-head attention with cosine similarity and one learned temperature per head."""

    zero_k_bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    @property
    def bias(self) -> Tensor:
        """The bias of queries, keys and values, (3 D,)."""
        return torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])

    @property
    def temperature_h1(self) -> Tensor:
        """The attention scale of each head, (h, 1), capped at 100: the length of its queries."""
        return self.scale_mul_1H11.clamp(max=math.log(100.0)).exp().view(-1, 1)

    def joint(self, x_BlD: Tensor) -> Tensor:
        """Return queries, keys and values side by side, (B, l, 3 D)."""
        if self.mat_qkv.bias is not None:  # the map was packed, and the bias with it
            return self.mat_qkv(x_BlD)
        return F.linear(x_BlD, self.mat_qkv.weight, self.bias)

    def project(self, x_BlD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit-length queries (times their temperature), unit-length keys, and values: (B, h, l, c) each."""
        q, k, v = self.joint(x_BlD).unflatten(2, (3, self.heads, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        return F.normalize(q, dim=-1) * self.temperature_h1.unsqueeze(2), F.normalize(k, dim=-1), v

    def forward(
        self, x_BlD: Tensor, block: int, bias_11LL: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return (B, l, D). Training passes the block-causal bias, sampling the cache, which needs none."""
        q, k, v = self.project(x_BlD)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.append(block, k, v)
        bias = None if bias_11LL is None else bias_11LL.to(v.dtype)
        h_Bhlc = self.attend(q, k, v, attn_mask=bias, scale=1.0)
        return self.proj(h_Bhlc.transpose(1, 2).flatten(2))


LABEL_DROP = 0.1
"""Probability that training shows "no class" instead of the label, so that guidance has an unconditional prediction."""


class FeedForward(nn.Module):
    """Linear to four times the width, GELU (tanh form), linear back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.gelu: nn.Module = nn.GELU(approximate="tanh")
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
        """The linear map."""
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

    def drop_gates(self, ada_B16D: Tensor) -> Tensor:
        """Return modulations whose gates are zero for the samples that leave out a branch in training.

        Drawn out here, the probability is no constant of `forward`, so that all blocks are one to torch.compile.
        """
        if not self.training:
            return ada_B16D
        gamma1, gamma2, *others = ada_B16D.unbind(2)
        return torch.stack([self.drop_path(gamma1), self.drop_path(gamma2), *others], 2)

    def forward(
        self, x_BlD: Tensor, ada_B16D: Tensor, block: int, bias_11LL: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Return the residual stream after this block, (B, l, D)."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = ada_B16D.unbind(2)
        h_BlD = self.attn(normalize(x_BlD, scale1, shift1), block, bias_11LL, cache)
        x_BlD = torch.addcmul(x_BlD, h_BlD, gamma1)
        h_BlD = self.ffn(normalize(x_BlD, scale2, shift2))
        return torch.addcmul(x_BlD, h_BlD, gamma2)


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

    def drop_labels(self, label_B: Tensor, first: int = 0, total: int | None = None) -> Tensor:
        """Return labels of which about a tenth became "no class", drawn from torch's global generator.

        Args:
            label_B: labels, of a batch or of a part of one.
            first: its first row in the batch.
            total: rows of the batch; None is this part alone.
        """
        count = label_B.shape[0]
        dropped_B = torch.rand(total or count, device=label_B.device)[first : first + count] < LABEL_DROP
        return label_B.masked_fill(dropped_B, self.config.null_class)

    def modulations(self, class_BD: Tensor) -> list[Tensor]:
        """Return each block's (B, 1, 6, D). They depend on the class alone, so once per image is enough."""
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

    def forward(
        self, label_B: Tensor, input_BLC: Tensor, read: Callable[[nn.Module, Tensor], Any] | None = None
    ) -> Any:
        """Return logits (B, L, V) of all scales at once, from the true coarser tokens.

        Args:
            label_B: rows of the class table.
            input_BLC: `Quantizer.teacher_input` of all scales, or of the first few; (B, L - 1, C).
            read: takes the head and its input (B, L, D), for logits too many for memory; its result is returned
                instead of logits.
        """
        length = 1 + input_BLC.shape[1]
        bias_11LL = self.attn_bias_for_masking[:, :, :length, :length]
        class_BD = self.class_emb(label_B)
        first_B1D = class_BD.unsqueeze(1) + self.pos_start
        x_BLD = torch.cat([first_B1D.to(input_BLC.dtype), self.word_embed(input_BLC)], dim=1)
        x_BLD = x_BLD + self.lvl_embed(self.lvl_1L[:, :length]) + self.pos_1LC[:, :length]
        blocks = cast("Iterable[Block]", self.blocks)
        for i, (block, ada_B16D) in enumerate(zip(blocks, self.modulations(class_BD), strict=True)):
            x_BLD = block(x_BLD, block.drop_gates(ada_B16D), i, bias_11LL, None)
        x_BLD = self.head_nm(x_BLD, class_BD)
        return self.head(x_BLD) if read is None else read(self.head, x_BLD)


def block_causal_bias(level_L: Tensor) -> Tensor:
    """Return the bias (1, 1, L, L) that lets a token see its own and coarser scales: 0 there, -inf elsewhere."""
    visible_LL = level_L[:, None] >= level_L[None, :]
    return torch.where(visible_LL, 0.0, -torch.inf)[None, None]


class StochasticDepth(nn.Module):
    """Drop the gate of a residual branch for whole samples in training (Huang et al. 2016), keeping its expectation."""

    rows: tuple[int, int] | None = None
    """The first row and the number of rows of the whole batch, where the input is a part of one."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the gates, zeroed for some samples while training and scaled up for the others."""
        if not self.training or self.probability == 0:
            return x_BLD
        keep = 1 - self.probability
        count = x_BLD.shape[0]
        first, total = self.rows or (0, count)
        mask_B11 = torch.empty(total, 1, 1, dtype=x_BLD.dtype, device=x_BLD.device).bernoulli_(keep)
        return x_BLD * (mask_B11[first : first + count] / keep)
