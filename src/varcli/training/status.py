"""Checks of a training run: what is normal, and what is off in this run, from its metrics log alone.

Each check compares a figure with that of a healthy run. The bounds are wide. They were tried on small runs, healthy
and with a planted fault (tests/test_status.py): a check that is off is worth a look.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from varcli.config import TransformerConfig, from_json, sequence_length
from varcli.training.estimate import IMAGENET, expected_losses_at
from varcli.training.optim import WARM_UP
from varcli.training.tokenizer import RECORDED, collapsed

MOST_COPIES = 0.01
"""Part of the images that may be exact duplicates of others."""
LEARNING_RATE = 12.0
"""Factor by which a learning rate may be above or below the usual one; fine-tuning takes a sixth of it."""
TRANSFORMER_RATE, TOKENIZER_RATE = 0.019, 4e-4
"""Usual peaks: a transformer's as a multiple of the spread sqrt(1/(3 D)) of its initial weights, which the published
recipes of all depths share within a third; a tokenizer's as it is, between those of our own runs."""
LOSS_TOLERANCE = 0.25
"""Nats per token by which a run on ImageNet may miss the loss of the scaling laws."""
LABEL_GAIN = 0.05
"""Least cost of a wrong label, as a fraction of ln(classes) nats per image, the entropy of a label."""
OVERFITTING = 0.01, 0.05
"""How far a held-out loss may be above its best, and above the loss in training, as fractions of these."""
PSNR_LOSS = 0.3
"""dB by which a held-out PSNR may be below its best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A figure of a run beside what is normal."""

    name: str
    found: str
    normal: str
    off: bool
    advice: str
    """What to do where it is off."""


Lines = Sequence[Mapping[str, float]]
"""Of a metrics log, oldest first."""


def check_lines(lines: Lines, settings: Mapping[str, Any], steps: int, copies: float | None) -> list[Check]:
    """Compare a run with what is normal.

    Args:
        lines: of its metrics log.
        settings: all that shaped it: the fields of its model's and its recipe's configuration.
        steps: of the whole run.
        copies: part of its images that are exact duplicates of others, None where it is not known.

    Returns:
        What could be checked. There are more checks after the warm-up, and with held-out images.
    """
    found = [_learning_rate(settings)]
    if lines[-1]["step"] > WARM_UP * steps:
        found += _collapse(lines, settings)
        found += _learned(lines)
        found += _expected_loss(lines, settings)
        found += _labels(lines, settings)
    found += _overfitting(lines, settings)
    if copies is not None:
        found.append(
            Check(
                name="copies",
                found=f"{copies:.1%} of the images are exact duplicates of others",
                normal=f"at most {MOST_COPIES:.0%}",
                off=copies > MOST_COPIES,
                advice="leave out the duplicates: they count as more data and are not",
            )
        )
    return found


def _last(lines: Lines, figure: str) -> float | None:
    """The newest value of a figure."""
    return next((line[figure] for line in reversed(lines) if figure in line), None)


def _learning_rate(settings: Mapping[str, Any]) -> Check:
    """The peak of the learning rate beside the usual one for the model's width."""
    peak = settings["base_lr"] * settings["batch"] / 256
    usual = TRANSFORMER_RATE / math.sqrt(3 * settings["width"]) if "width" in settings else TOKENIZER_RATE
    factor = max(peak / usual, usual / peak)
    return Check(
        name="learning rate",
        found=f"{peak:.2g} at its peak; about {usual:.1g} is usual",
        normal=f"{usual / LEARNING_RATE:.1g} to {usual * LEARNING_RATE:.1g}",
        off=factor > LEARNING_RATE,
        advice=f"try --base-lr {settings['base_lr'] * usual / peak:.1g} in another --out",
    )


def _collapse(lines: Lines, settings: Mapping[str, Any]) -> Iterator[Check]:
    """Whether each scale uses the codebook."""
    if lines[-1]["step"] < RECORDED:
        return
    rows = settings.get("codebook_size", 0)
    collapsed_scales, perplexities = [], []
    for scale, side in enumerate(settings.get("sides", ()), 1):
        perplexity = _last(lines, f"codebook_perplexity_{scale}")
        if perplexity is None:
            return
        perplexities.append(f"{perplexity:.3g}")
        if collapsed(perplexity, rows, RECORDED * settings["batch"] * side * side):
            collapsed_scales.append(str(scale))
    which = f"; scale {', '.join(collapsed_scales)} has collapsed" if collapsed_scales else ""
    yield Check(
        name="codebook",
        found=f"perplexity by scale {', '.join(perplexities)}{which}",
        normal=f"well above 1 row, of {rows}",
        off=bool(collapsed_scales),
        advice="try a lower --base-lr, a higher --scale-drop, or a smaller --codebook-size",
    )


def _learned(lines: Lines) -> Iterator[Check]:
    """Whether a transformer is, or was, better than the frequencies of the tokens."""
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    frequencies = _last(lines, "validation_frequency_loss")
    if not losses or frequencies is None:
        return
    yield Check(
        name="learned",
        found=f"held-out loss {min(losses):.3f} at best",
        normal=f"below {frequencies:.3f}, what the frequencies of the tokens reach",
        off=min(losses) >= frequencies,
        advice="the model predicts no better than token frequencies: train longer, or change the learning rate",
    )


def _expected_loss(lines: Lines, settings: Mapping[str, Any]) -> Iterator[Check]:
    """Held-out loss beside that of the scaling laws for its depth and images seen, where they apply."""
    loss, seen = _last(lines, "validation_loss"), lines[-1]["images_seen"]
    names = TransformerConfig.__dataclass_fields__
    if loss is None or settings.get("class_count") != 1000 or seen < IMAGENET:
        return
    shape = {name: value for name, value in settings.items() if name in names}
    expected = expected_losses_at(from_json(TransformerConfig, json.dumps(shape)), seen)
    if expected is not None:
        yield Check(
            name="loss",
            found=f"held-out loss {loss:.2f} mean, {_last(lines, 'validation_loss_last'):.2f} last scale",
            normal=f"about {expected[0]:.2f} and {expected[1]:.2f} after {seen / IMAGENET:.0f} epochs of ImageNet",
            off=loss > expected[0] + LOSS_TOLERANCE,
            advice="see the other checks; the laws are of ImageNet 256 and the released tokenizer",
        )


def _labels(lines: Lines, settings: Mapping[str, Any]) -> Iterator[Check]:
    """Whether labels help on held-out images, once anything has been learned."""
    gain, classes = _last(lines, "validation_label_gain"), settings.get("class_count", 1)
    if gain is None or classes < 2 or any(check.off for check in _learned(lines)):
        return
    most = math.log(classes) / sequence_length(settings["sides"])
    yield Check(
        name="labels",
        found=f"a wrong label costs {gain:.4f} nats per token",
        normal=f"at least {LABEL_GAIN * most:.4f}",
        off=gain < LABEL_GAIN * most,
        advice="the labels do not help to predict the images: check that each image is in the folder of its class",
    )


def _overfitting(lines: Lines, settings: Mapping[str, Any]) -> Iterator[Check]:
    """Whether held-out images do worse than before, or than training images."""
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    psnrs = [line["validation_psnr"] for line in lines if "validation_psnr" in line]
    if losses:
        training = _training_loss(lines[-1], settings) or losses[-1]
        above_best, above_training = OVERFITTING
        found = f"held-out loss {losses[-1]:.3f}, at best {min(losses):.3f}, in training {training:.3f}"
        normal = f"at most {above_best:.0%} above its best, {above_training:.0%} above training"
        off = losses[-1] > min(losses) * (1 + above_best) or losses[-1] > training * (1 + above_training)
    elif psnrs:
        found = f"held-out PSNR {psnrs[-1]:.2f} dB, at best {max(psnrs):.2f} dB"
        normal, off = f"at most {PSNR_LOSS:g} dB below its best", psnrs[-1] < max(psnrs) - PSNR_LOSS
    else:
        return
    yield Check(
        name="data",
        found=found,
        normal=normal,
        off=off,
        advice="too few images for so many epochs: more images, fewer --epochs, or a smaller model",
    )


def _training_loss(line: Mapping[str, float], settings: Mapping[str, Any]) -> float | None:
    """The loss of all tokens in training, None where no step had all of them.

    With `--scale-drop` the logged loss is partly of the coarse scales alone; each scale's is of the steps that have it.
    """
    if not settings.get("scale_drop"):
        return line.get("loss")
    sides = settings["sides"]
    losses = [line.get(f"loss_scale_{scale}") for scale in range(1, len(sides) + 1)]
    sums = [side**2 * loss for side, loss in zip(sides, losses, strict=True) if loss is not None]
    return sum(sums) / sequence_length(sides) if len(sums) == len(sides) else None
