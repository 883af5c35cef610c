"""Approximations that save time in the last scales, which have most tokens, by their names in `config.APPROXIMATIONS`.

None of them is on unless asked for; `benchmarks/approximations.py` measures what each saves and what it costs.

guidance: the last scales are sampled without guidance, so that they have half the rows.
    Source: Kynkäänniemi et al., arXiv 2404.07724 (guidance in an interval only, there of diffusion);
    SkipVAR, arXiv 2506.08908 (unconditional branches of VAR's last scales are redundant).
tokens: of the last scales only the tokens that differ most from the mean of their map go through the blocks; the others
    reuse the update of the previous scale.
    Source: FastVAR, arXiv 2503.23367 (pivotal tokens, and restoring the others from a cached, interpolated map).
    Differs: chosen once per scale by the input, and restored once after all layers, not in each of them.
cache: every other key and value of a finished scale of middle size is dropped.
    Source: HACK, arXiv 2504.09261, and ScaleKV, arXiv 2505.19602 (most keys of finer scales are redundant).
    Differs: they are chosen by position, not by attention, so that attention stays one fused operation.

Shapes: B images, R rows of the transformer's batch, l tokens of one scale, k of them that are computed, D width,
C codebook channels, s the side of a scale.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from varcli.config import SampleConfig
from varcli.models.transformer import Transformer
from varcli.sampling.scale_model import ScaleModel

LATE = 2
"""Number of last scales that are approximated: over half of all tokens in the published grids."""

COARSE = 16
"""Of scales of so many tokens or fewer every key and value is kept: there are few of them, and they hold the layout."""


class ApproximateScaleModel(ScaleModel):
    """`ScaleModel` with some approximations."""

    def __init__(self, transformer: Transformer, labels: Sequence[int] | Tensor, config: SampleConfig) -> None:
        super().__init__(transformer, labels, config)
        self.approximations, self.sides = config.approximations, transformer.config.sides
        self.starts = [0]
        """For each scale, the number of keys and values before it."""
        for scale, side in enumerate(self.sides):
            kept = self._computed(scale)
            if "cache" in self.approximations and side * side > COARSE:
                kept = -(-kept // 2)
            self.starts.append(self.starts[-1] + kept)
        self.changes: dict[int, Tensor] = {}
        """The update of the residual stream in the scales that later ones are restored from, (R, l, D)."""

    def hidden(self, scale: int, input_BlC: Tensor | None) -> Tensor:
        """Return the head's input for a scale, (R, l, D); without guidance R is B."""
        x_RlD = self.entering(scale, input_BlC)
        if self._late(scale) and "guidance" in self.approximations:
            self._drop_unconditional_rows()
            x_RlD = x_RlD[: self.count]
        self.cache.filled = self.starts[scale]
        if input_BlC is None or self._computed(scale) == input_BlC.shape[1]:
            after_RlD = self.through_blocks(x_RlD.clone())
        else:
            after_RlD = self._in_part(scale, x_RlD, pivotal(input_BlC, self._computed(scale)))
        self._thin_cache(scale)
        if "tokens" in self.approximations and self._late(scale + 1):
            self.changes[scale] = after_RlD - x_RlD
        return self.normalized(after_RlD)

    def guide(self, h_RlD: Tensor, scale: int) -> Tensor:
        """Return guided rows, or the rows themselves where a scale has no guidance."""
        return h_RlD if len(h_RlD) == self.count else super().guide(h_RlD, scale)

    def _late(self, scale: int) -> bool:
        return scale >= max(1, len(self.sides) - LATE)

    def _computed(self, scale: int) -> int:
        """How many tokens of a scale go through the blocks."""
        tokens = self.sides[scale] ** 2
        return tokens // 2 if "tokens" in self.approximations and self._late(scale) else tokens

    def _drop_unconditional_rows(self) -> None:
        count = self.count
        self.modulations = [ada_R16D[:count] for ada_R16D in self.modulations]
        self.final_scale, self.final_shift = self.final_scale[:count], self.final_shift[:count]
        self.cache = self.cache.first_rows(count)

    def _in_part(self, scale: int, x_RlD: Tensor, position_Bk: Tensor) -> Tensor:
        """Return the residual stream after the blocks, (R, l, D); only the given positions go through them."""
        position_RkD = position_Bk.repeat(len(x_RlD) // self.count, 1)[:, :, None].expand(-1, -1, x_RlD.shape[2])
        after_RkD = self.through_blocks(x_RlD.gather(1, position_RkD))
        change_RlD = resized_map(self.changes[scale - 1][: len(x_RlD)], self.sides[scale])
        return (x_RlD + change_RlD).scatter(1, position_RkD, after_RkD)

    def _thin_cache(self, scale: int) -> None:
        """Drop the keys and values of a finished scale that have no room before those of the next."""
        start, end = self.starts[scale], self.starts[scale] + self._computed(scale)
        following, last = self.starts[scale + 1], scale + 1 == len(self.sides)
        if following < end and not last:
            self.cache.halve(start, end)


def pivotal(input_BlC: Tensor, count: int) -> Tensor:
    """Return the positions (B, k) of the tokens whose input differs most from the mean of their image's."""
    difference_Bl = (input_BlC - input_BlC.mean(1, keepdim=True)).square().sum(-1)
    return difference_Bl.topk(count, dim=1).indices


def resized_map(h_RlD: Tensor, side: int) -> Tensor:
    """Return a map of tokens (R, l, D) at another side, interpolated linearly."""
    before = round(h_RlD.shape[1] ** 0.5)
    h_RDss = h_RlD.mT.unflatten(2, (before, before))
    return F.interpolate(h_RDss, size=(side, side), mode="bilinear").flatten(2).mT.contiguous()
