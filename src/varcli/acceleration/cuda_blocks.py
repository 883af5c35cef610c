"""A block's branches for a GPU in 16 bits.

On a GPU matrix products are fast, so passes over memory matter. Here each pass does all it can, and writes in the
precision that is needed next, straight into the cache where the result belongs there.

Shapes: B rows of the batch, l tokens of this call, L tokens of all scales, D width, h heads of c = 64 channels.
"""

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from varcli.config import HEAD_WIDTH, TransformerConfig
from varcli.models.transformer import Block, KeyValueCache, Transformer

Branch = tuple[Tensor, Tensor]
"""The output of a block's attention or feed-forward part, (B, l, D), and its gate γ, (B, 1, D)."""


class BlockBranches(Protocol):
    """What a block adds to the residual stream; input and output have the precision of its weights."""

    dtype: torch.dtype

    def __init__(self, block: Block) -> None: ...

    def residual_norm(
        self, x_BlD: Tensor, branch: Branch | None, factor_B1D: Tensor, shift_B1D: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Change the residual stream in place and return the input of the next product, as the function below does."""

    def attend(self, x_BlD: Tensor, number: int, cache: Any) -> Tensor:
        """Return the attention branch, (B, l, D): over the token's own scale and those before it."""

    def feed(self, x_BlD: Tensor) -> Tensor:
        """Return the feed-forward branch, (B, l, D)."""


class FusedBlocks:
    """All blocks of a transformer, called like the transformer itself."""

    def __init__(self, transformer: Transformer, kind: type[BlockBranches]) -> None:
        self.transformer = transformer
        self.blocks = [kind(block) for block in cast("Iterable[Block]", transformer.blocks)]
        self.dtype = self.blocks[0].dtype

    def modulations(self, class_BD: Tensor) -> list[Tensor]:
        """Return each block's γ1, γ2, 1 + scale1, 1 + scale2, shift1, shift2 as (B, 1, 6, D) in float32."""
        lower = self.dtype != torch.float32
        with torch.autocast(class_BD.device.type, self.dtype, enabled=lower, cache_enabled=False):
            found = [ada.float() for ada in self.transformer.modulations(class_BD)]
        for ada_B16D in found:
            ada_B16D[:, :, 2:4] += 1
        return found

    def step(self, x_BlD: Tensor, modulations: list[Tensor], cache: KeyValueCache) -> Tensor:
        """Return the residual stream of one scale after all blocks, computed in place."""
        branch: Branch | None = None
        for i, (block, ada_B16D) in enumerate(zip(self.blocks, modulations, strict=True)):
            gamma1, gamma2, factor1, factor2, shift1, shift2 = ada_B16D.unbind(2)
            h_BlD = block.attend(block.residual_norm(x_BlD, branch, factor1, shift1, self.dtype), i, cache)
            branch = h_BlD, gamma1
            h_BlD = block.feed(block.residual_norm(x_BlD, branch, factor2, shift2, self.dtype))
            branch = h_BlD, gamma2
        if branch is not None:
            x_BlD.addcmul_(*branch)
        cache.advance(x_BlD.shape[1])
        return x_BlD


def residual_norm(
    x_BlD: Tensor, branch: Branch | None, factor_B1D: Tensor, shift_B1D: Tensor, dtype: torch.dtype
) -> Tensor:
    """Add a branch to the residual stream, in place; return LN(x)·factor + shift, (B, l, D), in another precision."""
    if branch is not None:
        x_BlD.addcmul_(*branch)
    normal_BlD = F.layer_norm(x_BlD, x_BlD.shape[-1:], eps=1e-6)
    return torch.addcmul(shift_B1D, normal_BlD, factor_B1D, out=torch.empty_like(x_BlD, dtype=dtype))


SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class ScaleCache(KeyValueCache):
    """Keys and values of all scales but the last, for all blocks; a block needs its last scale's only while it runs.

    The last scale of the published grids has more than a third of all tokens.
    """

    def __init__(self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        before_last = config.length - config.sides[-1] ** 2
        shape = (config.depth, 2, batch, config.heads, before_last, HEAD_WIDTH)
        self.kv = list(torch.empty(shape, device=device, dtype=dtype))
        self.whole_2BhLc = torch.empty((2, batch, config.heads, config.length, HEAD_WIDTH), device=device, dtype=dtype)
        self.filled = 0

    def until(self, block: int, end: int) -> Tensor:
        """A view of a block's keys and values of the first `end` tokens, to read or to write: (2, B, h, end, c)."""
        if end <= self.kv[block].shape[3]:
            return super().until(block, end)
        self.whole_2BhLc[:, :, :, : self.filled] = super().until(block, self.filled)
        return self.whole_2BhLc[:, :, :, :end]

    def first_rows(self, count: int) -> "ScaleCache":
        """Return the part of the first `count` rows of the batch."""
        part = cast("ScaleCache", super().first_rows(count))
        part.whole_2BhLc = self.whole_2BhLc[:, :count]
        return part


def normalized(qkv_Bl3hc: Tensor, temperature_h1: Tensor, k_Bhlc: Tensor, v_Bhlc: Tensor) -> Tensor:
    """Store unit-length keys, and the values; return queries whose length is their temperature.

    The queries, (B, h, l, c), overwrite the input.
    """
    length_Bl2h1 = torch.linalg.vector_norm(qkv_Bl3hc[:, :, :2], dim=-1, keepdim=True, dtype=torch.float32)
    length_Bl2h1.clamp_min_(1e-12)
    q_Blhc, k_Blhc, v_Blhc = qkv_Bl3hc.unbind(2)
    torch.div(k_Blhc, length_Bl2h1[:, :, 1], out=k_Bhlc.transpose(1, 2))
    v_Bhlc.copy_(v_Blhc.transpose(1, 2))
    return q_Blhc.mul_(temperature_h1 / length_Bl2h1[:, :, 0]).transpose(1, 2)


class GpuBlock:
    """One block's two branches; input and output have the precision of its weights."""

    residual_norm = staticmethod(residual_norm)
    normalize = staticmethod(normalized)

    def __init__(self, block: Block) -> None:
        attn = block.attn
        self.qkv, self.proj, self.fc1, self.fc2 = attn.mat_qkv, attn.proj, block.ffn.fc1, block.ffn.fc2
        self.dtype, self.heads = attn.mat_qkv.weight.dtype, attn.heads
        self.bias = attn.bias.to(self.dtype)
        self.temperature_h1 = attn.temperature_h1

    def attend(self, x_BlD: Tensor, number: int, cache: ScaleCache) -> Tensor:
        """Return the attention branch, (B, l, D): over the token's own scale and those before it."""
        start, end = cache.filled, cache.filled + x_BlD.shape[1]
        qkv_Bl3hc = F.linear(x_BlD, self.qkv.weight, self.bias).unflatten(2, (3, self.heads, HEAD_WIDTH))
        k_BhLc, v_BhLc = cache.until(number, end)
        q_Bhlc = self.normalize(qkv_Bl3hc, self.temperature_h1, k_BhLc[:, :, start:], v_BhLc[:, :, start:])
        h_Bhlc = F.scaled_dot_product_attention(q_Bhlc, k_BhLc, v_BhLc, scale=1.0)
        return self.proj(h_Bhlc.transpose(1, 2).flatten(2))

    def feed(self, x_BlD: Tensor) -> Tensor:
        """Return the feed-forward branch, (B, l, D)."""
        return self.fc2(linear_gelu(x_BlD, self.fc1))


def linear_gelu(x_BlD: Tensor, layer: nn.Linear) -> Tensor:
    """Return GELU (tanh form) of a linear map; on CUDA one kernel does both."""
    if not x_BlD.is_cuda:  # elsewhere the fused operation has the exact form of GELU
        return F.gelu(layer(x_BlD), approximate="tanh")
    x_ND = torch._addmm_activation(layer.bias, x_BlD.flatten(0, 1), layer.weight.T, use_gelu=True)
    return x_ND.unflatten(0, x_BlD.shape[:2])


def for_gpu(transformer: Transformer) -> bool:
    """Whether these blocks can replace a transformer's own: in 16 bits on CUDA, with plain linear layers."""
    blocks = list(cast("Iterable[Block]", transformer.blocks))
    layers = [layer for b in blocks for layer in (b.attn.mat_qkv, b.attn.proj, b.ffn.fc1, b.ffn.fc2)]
    plain = all(type(layer) is nn.Linear and not is_traceable_wrapper_subclass(layer.weight) for layer in layers)
    return plain and all(layer.weight.is_cuda and layer.weight.dtype in SIXTEEN_BITS for layer in layers)
