"""A block's branches for a processor in bf16, or in int8 with everything else in bf16.

Two things differ from a GPU's. Where precisions are mixed torch's operations on a processor make copies in the wider
one, so that each pass here has one precision. And attention is two products with 2^x between them, which its bounded
scores allow: torch's own takes five times as long, and a softmax between them twice as long as 2^x and the sums.

Shapes: B rows of the batch, l tokens of this call, L tokens of all scales so far, D width, h heads of c = 64
channels, N = B·h.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.acceleration.fused_blocks import advanced
from varcli.config import HEAD_WIDTH, TransformerConfig
from varcli.models.transformer import Block, KeyValueCache, Transformer

STEEP = 64
"""Temperatures up to this leave 2^score within 2^±93, so that in bf16 (2^±127) there is room for sums over thousands
of tokens, weighted with values up to millions."""


class GrowingCache(KeyValueCache):
    """Keys and values of a block in one piece at every scale, as products want them; other layouts are copied first."""

    def __init__(self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        nothing_2Bh0c = torch.empty((2, batch, config.heads, 0, HEAD_WIDTH), device=device, dtype=dtype)
        self.kv = [nothing_2Bh0c] * config.depth
        self.filled = 0

    def until(self, block: int, end: int) -> Tensor:
        """Return new memory for a block's first `end` tokens with those there are: (2, B, h, end, c)."""
        before_2BhLc = self.kv[block]
        self.kv[block] = before_2BhLc.new_empty((*before_2BhLc.shape[:3], end, HEAD_WIDTH))
        self.kv[block][:, :, :, : self.filled] = before_2BhLc[:, :, :, : self.filled]
        return self.kv[block]


class CpuBlock:
    """One block's two branches, from and to the precision of its weights."""

    advance = staticmethod(advanced)

    def __init__(self, block: Block) -> None:
        attn = block.attn
        self.proj, self.feed, self.heads = attn.proj, block.ffn, attn.heads
        self.dtype = attn.proj.bias.dtype
        self.qkv: Callable[[Tensor], Tensor] = attn.mat_qkv
        if attn.mat_qkv.bias is None:  # it was not packed, and its bias with it
            self.qkv = partial(F.linear, weight=attn.mat_qkv.weight, bias=attn.bias.to(self.dtype))
        temperature_h1 = attn.temperature_h1
        self.steep = bool(temperature_h1.max() > STEEP)
        # Queries and keys are brought to their lengths in one pass: to the temperature, in base 2, and to 1.
        self.factor_2h1 = torch.stack([temperature_h1 * math.log2(math.e), torch.ones_like(temperature_h1)])

    def attend(self, x_BlD: Tensor, number: int, cache: KeyValueCache) -> Tensor:
        """Return what each token gathers from its own scale and those before it, (B, l, D)."""
        qkv_Bl3hc = self.qkv(x_BlD).unflatten(2, (3, self.heads, HEAD_WIDTH))
        qk_Bl2hc = qkv_Bl3hc[:, :, :2].float()
        length_Bl2h1 = torch.linalg.vector_norm(qk_Bl2hc, dim=-1, keepdim=True)
        qk_Bl2hc *= self.factor_2h1 / length_Bl2h1.clamp_min_(1e-12)
        q_Bhlc, k_Bhlc = qk_Bl2hc.permute(2, 0, 3, 1, 4)
        k_BhLc, v_BhLc = cache.append(number, k_Bhlc, qkv_Bl3hc[:, :, 2].transpose(1, 2))
        q_Bhlc = q_Bhlc.to(self.dtype, memory_format=torch.contiguous_format)
        h_Nlc = gather(q_Bhlc.flatten(0, 1), k_BhLc.flatten(0, 1), v_BhLc.flatten(0, 1), steep=self.steep)
        return self.proj(h_Nlc.view_as(q_Bhlc).transpose(1, 2).flatten(2))


def gather(q_Nlc: Tensor, k_NLc: Tensor, v_NLc: Tensor, *, steep: bool) -> Tensor:
    """Return softmax(q·kᵀ·ln 2)·v, (N, l, c): attention with the logarithm's base in the queries.

    A softmax takes the largest score from all others lest the exponential overflow. Queries and keys of unit length
    bound their scores by the temperature, so that this is left out unless one is `steep`. Scores are rounded to bf16,
    which torch's own attention does not do: at high temperatures that costs precision.
    """
    weight_NlL = q_Nlc @ k_NLc.mT
    if steep:
        weight_NlL -= weight_NlL.amax(-1, keepdim=True)
    weight_NlL.exp2_()
    return (weight_NlL @ v_NLc).div_(weight_NlL.sum(-1, keepdim=True))


def for_cpu(transformer: Transformer) -> bool:
    """Return whether these blocks can stand in for a transformer's own: in bf16, or int8 with it, on a processor."""
    biases = [cast("Tensor", block.attn.proj.bias) for block in cast("Iterable[Block]", transformer.blocks)]
    return all(bias.device.type == "cpu" and bias.dtype == torch.bfloat16 for bias in biases)
