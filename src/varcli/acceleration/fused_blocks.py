"""The transformer's blocks in 16 bits: the same arithmetic in as few passes over memory as torch knows.

Between the products of matrices the plain blocks read and write the residual stream some thirty times. What a pass
costs, and what it can do at once, depends on where it runs: `models.fused_gpu` and `models.fused_cpu` have a block's
branches for each. `models.transformer.Block` is the specification.

Shapes: B rows of the batch, l tokens of this call, D width.
"""

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.models.transformer import Block, KeyValueCache, Transformer

Branch = tuple[Tensor, Tensor]
"""What a block's attention or feed-forward part returned, (B, l, D), and the γ it is gated with, (B, 1, D)."""


class BlockBranches(Protocol):
    """What a block adds to the residual stream, from and to the precision of its weights."""

    dtype: torch.dtype

    def __init__(self, block: Block) -> None: ...

    def advance(
        self, x_BlD: Tensor, branch: Branch | None, factor_B1D: Tensor, shift_B1D: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return as `advanced` does what goes into the next product, having changed the residual stream in place."""

    def attend(self, x_BlD: Tensor, number: int, cache: Any) -> Tensor:
        """Return what each token gathers from its own scale and those before it, (B, l, D)."""

    def feed(self, x_BlD: Tensor) -> Tensor:
        """Return the feed-forward branch, (B, l, D)."""


class FusedBlocks:
    """All blocks of a transformer, to be called as the transformer itself is."""

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
        """Return the residual stream of one scale after all blocks, in the memory of what was given."""
        branch: Branch | None = None
        for i, (block, ada_B16D) in enumerate(zip(self.blocks, modulations, strict=True)):
            gamma1, gamma2, factor1, factor2, shift1, shift2 = ada_B16D.unbind(2)
            h_BlD = block.attend(block.advance(x_BlD, branch, factor1, shift1, self.dtype), i, cache)
            branch = h_BlD, gamma1
            h_BlD = block.feed(block.advance(x_BlD, branch, factor2, shift2, self.dtype))
            branch = h_BlD, gamma2
        if branch is not None:
            x_BlD.addcmul_(*branch)
        cache.advance(x_BlD.shape[1])
        return x_BlD


def advanced(x_BlD: Tensor, branch: Branch | None, factor_B1D: Tensor, shift_B1D: Tensor, dtype: torch.dtype) -> Tensor:
    """Add a branch to the residual stream, in place; return LN(x)·factor + shift, (B, l, D), in another precision."""
    if branch is not None:
        x_BlD.addcmul_(*branch)
    normal_BlD = F.layer_norm(x_BlD, x_BlD.shape[-1:], eps=1e-6)
    return torch.addcmul(shift_B1D, normal_BlD, factor_B1D, out=torch.empty_like(x_BlD, dtype=dtype))
