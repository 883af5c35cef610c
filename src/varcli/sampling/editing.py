"""Zero-shot editing: the scale loop with the tokens that an image keeps (paper, section 5.3).

Shapes: B squares, P pixels per side of the model's images, H = W = s_K, s the side and l = s² the tokens of one scale.
Masks are True where to fill, and keep masks True where a token stays.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import fmean, pstdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.acceleration.devices import block_weight, out_of_memory
from varcli.config import SampleConfig
from varcli.errors import RunError
from varcli.images.blending import feather_mask, match_levels, pull_push_fill
from varcli.images.png16 import Levels, Mask, as_deep_as, step, to_8_bits
from varcli.images.tiling import Plan, enlarged, shrunk, shrunk_mask
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.batching import batch_bytes
from varcli.sampling.likelihood import log_probabilities
from varcli.sampling.reconstruction import encode
from varcli.sampling.sampler import Keep, Pixels, ScaleResult, decode, generate

_MOST_AT_ONCE = 16
"""Squares in a batch; more are not faster."""

_BATCH_BYTES = 2 << 30
"""Memory of a batch of squares. It is the same on every machine, since rounding depends on the size of a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EditConfig:
    """How an edit is composited; with an image, a mask and a SampleConfig it determines the result."""

    feather: int | None = None
    """Width in the image's pixels over which the new fades into the kept; None is half a token."""
    composite: bool = True
    """Whether kept pixels come from the image; otherwise they come from the decoder."""
    released_rule: bool = False
    """Follow the released rule: the image's tokens as they are, the hole is not grown, and nothing is composited."""


@dataclass(slots=True)
class Edited:
    """An edited image, and scores of how good it is."""

    pixels: Levels
    """(height, width, 3), of as many bits as what was given."""
    seed: int
    seams: list[float] = field(default_factory=list)
    """Of each region, how far old and new differ where they meet, in grey levels of 255."""
    log_likelihoods: list[float] = field(default_factory=list)
    """Of each region's new tokens under the model, mean of the natural logarithms; empty unless requested."""
    frames: list[Pixels] = field(default_factory=list)
    """The image as it grew; empty unless requested."""

    @property
    def seam(self) -> float:
        """Mean of the tiles' seams."""
        return fmean(self.seams)

    @property
    def log_likelihood(self) -> float:
        """Mean of the tiles' log-likelihoods."""
        return fmean(self.log_likelihoods)


def best(candidates: Sequence[Edited]) -> Edited:
    """Return the candidate whose seam is smoothest and likelihood highest, both counted in standard deviations."""
    seams = [candidate.seam for candidate in candidates]
    likelihoods = [candidate.log_likelihood for candidate in candidates]

    def score(candidate: Edited) -> float:
        smoothness = (fmean(seams) - candidate.seam) / (pstdev(seams) or 1)
        return smoothness + (candidate.log_likelihood - fmean(likelihoods)) / (pstdev(likelihoods) or 1)

    return max(candidates, key=score)


# --- which tokens stay -----------------------------------------------------------------------------


def keep_by_coverage(hole_PP: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """Which tokens stay at each scale, (1, l) bool.

    The hole is first grown by one token of the last grid, because a token reaches into its neighbours.
    Then a token stays if the grown hole takes no more than half of it; from half the last grid's side on,
    only if it has not a single pixel of the hole. The coarsest scales, up to a quarter of that side, stay as
    a whole: they carry on the colours around the hole. They go by the rule of the others where the hole is
    most of the image.

    Differs: the released rule (`keep_as_released`) neither grows the hole nor ever lets the first scale change.
    """
    hole_11PP = hole_PP[None, None].float()
    grown_11HH = F.max_pool2d(F.adaptive_max_pool2d(hole_11PP, sides[-1]), 3, stride=1, padding=1)
    kept = []
    most = bool(hole_11PP.mean() > 0.5)
    for side in sides:
        keep_11ss = F.adaptive_avg_pool2d(grown_11HH, side) <= 0.5
        if 4 * side <= sides[-1] and not most:
            keep_11ss = torch.ones_like(keep_11ss)
        elif 2 * side >= sides[-1]:
            keep_11ss &= F.adaptive_max_pool2d(hole_11PP, side) == 0
        kept.append(keep_11ss.flatten(1))
    return kept


def keep_as_released(hole_PP: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """Which tokens stay at each scale, (1, l) bool, by the rule of the released demonstration.

    The mask on the last grid, interpolated bilinearly, decides by half; of up to three tokens all stay.
    """
    keep_11HH = (F.adaptive_avg_pool2d(hole_PP[None, None].float(), sides[-1]) <= 0.5).float()
    kept = []
    for side in sides:
        keep_11ss = F.interpolate(keep_11HH, size=(side, side), mode="bilinear", align_corners=False) > 0.5
        kept.append(torch.ones_like(keep_11ss).flatten(1) if side**2 <= 3 else keep_11ss.flatten(1))
    return kept


# --- the edit --------------------------------------------------------------------------------------


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Turn an out-of-memory error into one line that a user can act on."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            "the edit does not fit into memory; use a smaller model, --dtype bf16 or --device cpu"
        ) from error


class Editor:
    """Fills masks of images with one pair of models and one set of settings."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        transformer: Transformer,
        config: SampleConfig,
        rule: EditConfig | None = None,
        refiner: Transformer | None = None,
    ) -> None:
        """Take models that `dispatch.prepare` made ready; `refiner` as for `generate`."""
        self.tokenizer, self.transformer, self.config = tokenizer, transformer, config
        self.refiner = refiner
        self.rule = rule or EditConfig()

    @_enough_memory()
    def edit(
        self,
        pixels: Levels,
        plan: Plan,
        label: int,
        seed: int,
        *,
        scored: bool = False,
        growing: bool = False,
        scales: int | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Edited:
        """Return an image whose masked pixels are new.

        Args:
            pixels: (height, width, 3), of 8 or 16 bits.
            plan: the mask, and the squares that go through the model.
            label: index in the class table, `config.null_class` for none.
            seed: of the draws; each square has draws of its own.
            scored: also compute the likelihood, which takes one more pass of the model.
            growing: also give the image after each scale.
            scales: stop after so many, and give the image as it looks then; None is all.
            advance: called with the number of squares in a batch when it is done.

        Raises:
            RunError: memory runs out.
        """
        edited, size = Edited(pixels, seed), self.batch_size
        image, unknown = plan.padded(pixels), plan.padded(plan.mask)
        last = (scales or len(self.tokenizer.config.sides)) - 1
        for batch in (wave[i : i + size] for wave in plan.waves for i in range(0, len(wave), size)):
            given = [image[tile.slices].copy() for tile in batch]
            unknowns = [unknown[tile.slices].copy() for tile in batch]
            holes = [marks & plan.fills(tile) for marks, tile in zip(unknowns, batch, strict=True)]
            first, count = len(edited.seams), len(batch)
            keep, tokens = self.keep(given, unknowns), []
            results = self._scales(label, [seed + (i << 32) for i in range(first, first + count)], keep)
            for result in islice(results, last + 1):
                tokens.append(result.tokens)
                if not growing and result.scale < last:
                    continue
                decoded = decode(self.tokenizer, result.f_hat)
                made = [
                    self._matched(old, new, marks) for old, new, marks in zip(given, decoded, unknowns, strict=True)
                ]
                for tile, old, new, hole in zip(batch, given, made, holes, strict=True):
                    image[tile.slices] = self._composite(old, new, hole)
                edited.frames += [to_8_bits(plan.cropped(image).copy())] if growing else []
            for old, new, hole, marks in zip(given, made, holes, unknowns, strict=True):
                edited.seams.append(seam(old, new, hole, marks, self._feather(len(hole))))
            if scored:
                edited.log_likelihoods += log_likelihoods(self.transformer, self.tokenizer, tokens, keep, label)
            for tile, hole in zip(batch, holes, strict=True):
                unknown[tile.slices] &= ~hole
            advance(count)
        edited.pixels = plan.cropped(image)
        return edited

    @property
    def batch_size(self) -> int:
        """How many squares go through the model at once: up to 16, as many as two gigabytes hold."""
        count = _MOST_AT_ONCE
        both = [self.transformer] if self.refiner is None else [self.transformer, self.refiner]
        while count > 1 and sum(batch_bytes(self.tokenizer, each, self.config, count) for each in both) > _BATCH_BYTES:
            count //= 2
        return count

    @torch.inference_mode()
    def keep(self, given: Sequence[Levels], unknowns: Sequence[Mask]) -> Keep:
        """Which tokens of square images are kept; they do not depend on what is in the holes.

        Differs: the released rule tokenizes the image with the content of the hole, which then shows in the tokens
        around it.
        """
        config, device = self.tokenizer.config, block_weight(self.transformer).device
        rule = keep_as_released if self.rule.released_rule else keep_by_coverage
        squares, masks = [], []
        for levels, hole in zip(given, unknowns, strict=True):
            values = levels.astype(np.float32) / np.float32(step(levels))
            seen = values if self.rule.released_rule else pull_push_fill(values, ~hole)
            squares.append(shrunk(seen, config.pixels))
            hole_PP = torch.from_numpy(shrunk_mask(hole, config.pixels).copy()).to(device)
            masks.append(rule(hole_PP, config.sides))
        return Keep(encode(self.tokenizer, np.stack(squares)), [torch.cat(scale) for scale in zip(*masks, strict=True)])

    def _scales(self, label: int, seeds: Sequence[int], keep: Keep) -> Iterator[ScaleResult]:
        # Guiding "no class" away from "no class" changes nothing and costs a second pass.
        guided = self.rule.released_rule or label != self.transformer.config.null_class
        config = self.config if guided else replace(self.config, cfg=0)
        models, labels = (self.tokenizer, self.transformer), [label] * len(seeds)
        return generate(*models, labels, seeds, config, refiner=self.refiner, keep=keep)

    def _feather(self, side: int) -> int:
        """Return the feather width of a square of this side, in pixels."""
        half_token = max(1, round(side / self.tokenizer.config.sides[-1] / 2))
        return half_token if self.rule.feather is None else self.rule.feather

    def _matched(self, given: Levels, decoded: Pixels, hole: Mask) -> Levels:
        """The decoded square at the size of the given one and, for compositing, matched to its levels."""
        made = as_deep_as(enlarged(decoded, len(given)), given)
        return match_levels(given, made, hole, self.tokenizer.config.sides[-1]) if self._composites else made

    @property
    def _composites(self) -> bool:
        return self.rule.composite and not self.rule.released_rule

    def _composite(self, given: Levels, made: Levels, hole: Mask) -> Levels:
        if not self._composites:
            return made
        share = feather_mask(hole, self._feather(len(hole)))[:, :, None]
        return (given * (1 - share) + made * share).round().astype(given.dtype)


def seam(given: Levels, made: Levels, hole: Mask, unknown: Mask, feather: int) -> float:
    """How far old and new differ just outside a hole, where one fades into the other: mean of 255 levels.

    What is unknown, in this hole and others, is left out.
    """
    ring = (feather_mask(hole, max(feather, 1)) > 0) & ~unknown
    if not ring.any():
        return 0.0
    return float(np.abs(given[ring].astype(np.float32) - made[ring]).mean()) / step(given)


@torch.inference_mode()
def log_likelihoods(
    transformer: Transformer, tokenizer: Tokenizer, tokens: Sequence[Tensor], keep: Keep, label: int
) -> list[float]:
    """Return for each square the mean natural logarithm of its new tokens' probabilities, 0 where none is new.

    They are given the class and all coarser tokens. The last scales' tokens may be missing.
    """
    log_BL = log_probabilities(tokenizer, transformer, tokens, [label] * len(tokens[0]))
    new_BL = ~torch.cat(keep.masks[: len(tokens)], dim=1)
    return [float(log_L[new_L].mean()) if new_L.any() else 0.0 for log_L, new_L in zip(log_BL, new_BL, strict=True)]
