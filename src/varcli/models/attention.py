"""Self-attention with normalized queries and keys, and the cache sampling keeps of keys and values.

Shapes: B pictures, l tokens of this call, L tokens so far, D width, h heads of c = 64 channels.
"""

import math
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.config import HEAD_WIDTH, TransformerConfig


class KeyValueCache:
    """Keys and values of all blocks, allocated once for the whole sequence of a batch."""

    kv: list[Tensor]
    """Of each block the keys and the values, (2, B, h, L, c)."""

    def __init__(self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.depth, 2, batch, config.heads, config.length, HEAD_WIDTH)
        self.kv = list(torch.empty(shape, device=device, dtype=dtype))
        self.filled = 0

    def until(self, block: int, end: int) -> Tensor:
        """Return where a block's keys and values of the first `end` tokens are, or are to be put: (2, B, h, end, c)."""
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
        """Forget every other token from `start` to `end`; those that are left begin at `start`."""
        for kv_2BhLc in self.kv:
            left_2Bhlc = kv_2BhLc[:, :, :, start:end:2].clone()
            kv_2BhLc[:, :, :, start : start + left_2Bhlc.shape[3]] = left_2Bhlc


class SelfAttention(nn.Module):
    """Multi-head attention with cosine similarity and one learned temperature a head."""

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

    @property
    def bias(self) -> Tensor:
        """Return the bias of queries, keys and values, (3 D,)."""
        return torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])

    @property
    def temperature_h1(self) -> Tensor:
        """Return how long each head's queries are made, at most 100."""
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
        h_Bhlc = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.proj(h_Bhlc.transpose(1, 2).flatten(2))
