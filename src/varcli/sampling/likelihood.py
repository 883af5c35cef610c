"""Likelihood of an image's tokens given a class, and which class explains an image best.

Shapes: B images, R rows of the transformer's batch, P pixels per side, L tokens of all scales that are given, l of one.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from varcli.acceleration.devices import block_weight
from varcli.config import TransformerConfig, spans
from varcli.errors import ConfigError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.reconstruction import features
from varcli.sampling.sampler import Pixels

CANDIDATES = (10, 3)
"""Classes that stay after the first scales with a tenth of the tokens, and with three tenths (A-VARC's figures)."""

NOISE = 0.1
"""Standard deviation of the noise in further encodings of an image, as a fraction of the features' own."""

_BATCH_BYTES = 1 << 30
"""Memory of a batch of rows. It is the same on every machine, since rounding depends on the size of a batch."""


@torch.inference_mode()
def log_probabilities(
    tokenizer: Tokenizer, transformer: Transformer, tokens: Sequence[Tensor], labels: Sequence[int] | Tensor
) -> Tensor:
    """Return the natural logarithm of each token's probability given a class and all coarser tokens, (R, L).

    All scales are computed in one pass, and their input is computed once where all rows are of one image.

    Args:
        tokenizer: in evaluation mode, on the transformer's device.
        transformer: in evaluation mode; its blocks compute in the precision of their weights.
        tokens: token maps of all scales, or of the first few: (R, l), or (1, l) for the same image in every row.
        labels: index in the class table for each row, (R,); `config.null_class` for "no class".

    Source: paper, equation 4.
    """
    weight = block_weight(transformer)
    label_R = torch.as_tensor(labels, device=weight.device)
    input_BLC, idx_BL = tokenizer.quantize.teacher_input(tokens), torch.cat(list(tokens), dim=1)
    input_RLC, idx_RL = input_BLC.expand(len(label_R), -1, -1), idx_BL.expand(len(label_R), -1)
    size = _rows_at_once(transformer.config, idx_RL.shape[1])
    found = []
    for part in zip(label_R.split(size), input_RLC.split(size), idx_RL.split(size), strict=True):
        label_B, part_BLC, part_BL = part
        with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
            logits_BLV = transformer(label_B, part_BLC).float()
        found.append(logits_BLV.gather(-1, part_BL[:, :, None])[:, :, 0] - logits_BLV.logsumexp(-1))
    return torch.cat(found)


def _rows_at_once(config: TransformerConfig, length: int) -> int:
    """How many rows of `length` tokens go through the transformer at once."""
    values = 3 * config.codebook_size + 30 * config.width  # logits, what becomes of them; a block
    return max(1, _BATCH_BYTES // (4 * length * values))


@torch.inference_mode()
def encodings(tokenizer: Tokenizer, pixels_PP3: Pixels, count: int) -> list[Tensor]:
    """Return the token maps (B, l) of one image, encoded `count` times: as it is, then with noise on its features.

    The noise is the same for every image. Averaged over encodings, a likelihood depends less on which of several
    near rows of the codebook a feature falls to.

    Source: A-VARC (arXiv 2510.12060), likelihood smoothing.
    """
    f_1CHW = features(tokenizer, pixels_PP3[None])
    noise_BCHW = torch.randn((count - 1, *f_1CHW.shape[1:]), generator=torch.Generator().manual_seed(0))
    noisy_BCHW = f_1CHW + NOISE * f_1CHW.std() * noise_BCHW.to(f_1CHW)
    return tokenizer.quantize.quantize(torch.cat([f_1CHW, noisy_BCHW])).tokens


class RankedClass(NamedTuple):
    """How well a class explains an image."""

    label: int
    """Index in the class table."""
    nats: float
    """Negative natural logarithm of the tokens' probability; the mean where there are several encodings."""
    scales: int
    """How many of the coarsest scales were looked at. Only classes of as many can be compared by their nats."""


def rank_classes(
    tokenizer: Tokenizer, transformer: Transformer, tokens: Sequence[Tensor], candidates: Sequence[int] = CANDIDATES
) -> list[RankedClass]:
    """Return all classes, the one first that gives an image the highest likelihood.

    All classes are scored on the first scales that have a tenth of the tokens; the first of `candidates` on those that
    have three times as many, and so on. The last ones are scored on all scales.

    Args:
        tokenizer: as for `log_probabilities`, like the transformer.
        transformer: of the classes.
        tokens: token maps of one image in one or more encodings, (B, l).
        candidates: how many classes stay each time; none scores all classes on all scales.

    Raises:
        ConfigError: these numbers do not fall, or one is less than 1.

    Source: A-VARC (arXiv 2510.12060), partial-scale candidate pruning.
    """
    if any(more <= fewer for more, fewer in pairwise((*candidates, 0))):
        given = ",".join(map(str, candidates))
        raise ConfigError(f"--candidates must be falling numbers such as 10,3, or 0 for no pruning (got {given})")
    ranked: list[RankedClass] = []
    length = transformer.config.length
    label_R = torch.arange(transformer.config.class_count)
    for stage, kept in enumerate((*candidates, 0)):
        share = min(0.1 * 3**stage, 1) if kept else 1
        scales = next(k for k, span in enumerate(spans(transformer.config.sides), 1) if span.stop >= share * length)
        maps = [idx_Bl.split(1) for idx_Bl in tokens[:scales]]
        log_BR = [log_probabilities(tokenizer, transformer, one, label_R).sum(1) for one in zip(*maps, strict=True)]
        nats_R = -torch.stack(log_BR).mean(0).cpu()
        order_R = nats_R.argsort(stable=True)
        dropped = [RankedClass(int(label_R[i]), float(nats_R[i]), scales) for i in order_R[kept:]]
        ranked, label_R = dropped + ranked, label_R[order_R[:kept]]
    return ranked
