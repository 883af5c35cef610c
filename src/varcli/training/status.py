"""What is normal in a training run, and what is off in this one: judged from its metrics log alone.

Each check compares a figure with what a healthy run has. The bounds were set with runs of tiny64's size, healthy ones
and others with a planted fault (docs/log.md), and are wide: a check that is off is worth a look.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from varcli.config import TransformerConfig, from_json
from varcli.training.estimate import IMAGENET, expected_losses_at
from varcli.training.optim import WARM_UP
from varcli.training.tokenizer import HIT_DECAY, collapsed

MOST_COPIES = 0.01
"""Part of the images that may be copies of others."""
UPDATE_RATIO = (3e-4, 3e-2)
"""‖Δw‖ / ‖w‖ of a step at the peak of the learning rate, from the lowest to the highest that is normal."""
TYPICAL_UPDATE = 3e-3
LOSS_TOLERANCE = 0.25
"""Nats a token by which a run on ImageNet may miss the loss of the scaling laws."""
LEARNED = 0.1
"""Nats a token below the loss of token frequencies, from which on labels should be of use."""
LABEL_GAIN = 0.01
"""What the labels should be worth then, as a part of what was learned."""
OVERFITTING = {"loss": 0.02, "psnr": 0.3}
"""How much worse than its best a figure of held-out images may be: a part of the loss, and dB."""


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
        copies: part of its images that are copies of others, None where it is not known.

    Returns:
        What could be checked. A run says more when it is past its warm-up, and with held-out images.
    """
    found: list[Check] = []
    if lines[-1]["step"] > WARM_UP * steps:
        found += _learning_rate(lines, settings)
        found += _collapse(lines, settings)
        found += _learned(lines)
        found += _expected_loss(lines, settings)
        found += _labels(lines)
    found += _overfitting(lines)
    if copies is not None:
        found.append(
            Check(
                name="copies",
                found=f"{copies:.1%} of the images are copies of others",
                normal=f"at most {MOST_COPIES:.0%}",
                off=copies > MOST_COPIES,
                advice="leave out the copies: they count as more data and are not",
            )
        )
    return found


def _last(lines: Lines, figure: str) -> float | None:
    """The newest value of a figure."""
    return next((line[figure] for line in reversed(lines) if figure in line), None)


def _learning_rate(lines: Lines, settings: Mapping[str, Any]) -> Iterator[Check]:
    """How much a step at the peak of the learning rate changes the weights, the median over the log."""
    peak = settings["base_lr"] * settings["batch"] / 256
    ratios = [line["update_ratio"] * peak / line["learning_rate"] for line in lines if "update_ratio" in line]
    if not ratios:
        return
    ratio, (lowest, highest) = median(ratios), UPDATE_RATIO
    high = ratio > highest
    factor = ratio / TYPICAL_UPDATE if high else TYPICAL_UPDATE / max(ratio, 1e-12)
    yield Check(
        name="learning rate",
        found=f"at its peak a step changes the weights by {ratio:.2%}",
        normal=f"{lowest:.2%} to {highest:.0%}",
        off=not lowest <= ratio <= highest,
        advice=f"too {'high' if high else 'low'}: try --base-lr {settings['base_lr'] * TYPICAL_UPDATE / ratio:.1g}, "
        f"about {factor:.0f} × {'lower' if high else 'higher'}, in another --out",
    )


def _collapse(lines: Lines, settings: Mapping[str, Any]) -> Iterator[Check]:
    """The scale that makes least of the codebook, of what it could."""
    steps = min(lines[-1]["step"], 1 / (1 - HIT_DECAY))
    rows = settings.get("codebook_size", 0)
    collapsed_scales, perplexities = [], []
    for scale, side in enumerate(settings.get("sides", ()), 1):
        perplexity = _last(lines, f"codebook_perplexity_{scale}")
        if perplexity is None:
            return
        perplexities.append(f"{perplexity:.3g}")
        if collapsed(perplexity, rows, round(steps * settings["batch"]) * side * side):
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
    """Whether a transformer is better than the frequencies of the tokens."""
    loss, frequencies = _last(lines, "validation_loss"), _last(lines, "validation_frequency_loss")
    if loss is None or frequencies is None:
        return
    yield Check(
        name="learned",
        found=f"held-out loss {loss:.3f}",
        normal=f"below {frequencies:.3f}, what the frequencies of the tokens reach",
        off=loss >= frequencies,
        advice="it has learned nothing that tokens follow from: check --base-lr, and that the tokenizer is a good one",
    )


def _expected_loss(lines: Lines, settings: Mapping[str, Any]) -> Iterator[Check]:
    """Held-out loss beside that of the scaling laws for its depth and images seen, where these speak."""
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


def _labels(lines: Lines) -> Iterator[Check]:
    """Whether labels help on held-out images, once anything has been learned."""
    gain, loss = _last(lines, "validation_label_gain"), _last(lines, "validation_loss")
    frequencies = _last(lines, "validation_frequency_loss")
    if gain is None or loss is None or frequencies is None or frequencies - loss < LEARNED:
        return
    least = LABEL_GAIN * (frequencies - loss)
    yield Check(
        name="labels",
        found=f"labels lower the held-out loss by {gain:.4f}",
        normal=f"at least {least:.4f}",
        off=gain < least,
        advice="labels say nothing of the images: check that folders and labels belong to them",
    )


def _overfitting(lines: Lines) -> Iterator[Check]:
    """Whether held-out images do worse than they did, while training goes on."""
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    psnrs = [line["validation_psnr"] for line in lines if "validation_psnr" in line]
    if losses:
        worse, most = losses[-1] / min(losses) - 1, OVERFITTING["loss"]
        found, normal = f"held-out loss {worse:.1%} above its best", f"at most {most:.0%}"
    elif psnrs:
        worse, most = max(psnrs) - psnrs[-1], OVERFITTING["psnr"]
        found, normal = f"held-out PSNR {worse:.2f} dB below its best", f"at most {most:g} dB"
    else:
        return
    yield Check(
        name="data",
        found=found,
        normal=normal,
        off=worse > most,
        advice="too few images for so many epochs: more images, fewer --epochs, or a smaller model",
    )
