"""Learning rate and weight decay as functions of how far the training is."""

import math

WARM_UP = 0.02
"""Part of the steps in which the learning rate rises from WARM_UP_FROM to 1."""
WARM_UP_FROM = 0.005


def warm_up_or(step: int, steps: int, after: float) -> float:
    """Return the warm-up's factor while it lasts, then `after`."""
    length = WARM_UP * steps
    return WARM_UP_FROM + (1 - WARM_UP_FROM) * step / length if step < length else after


def progress_after_warm_up(step: int, steps: int) -> float:
    """Return p from 0 to 1 over the steps that follow the warm-up."""
    length = WARM_UP * steps
    return min(max(step - length, 0) / max(steps - 1 - length, 1), 1)


def linear_factor(step: int, steps: int, final: float) -> float:
    """Return the transformer's learning rate as a fraction of its peak.

    Source: "lin0" of the released recipe: 1 while p < 0.05, then linear to `final`.
    """
    p = progress_after_warm_up(step, steps)
    return warm_up_or(step, steps, 1 if p < 0.05 else final + (1 - final) * (1 - p) / 0.95)


def cosine_factor(step: int, steps: int, final: float) -> float:
    """Return the tokenizer's learning rate as a fraction of its peak: a half cosine down to `final`."""
    p = progress_after_warm_up(step, steps)
    return warm_up_or(step, steps, final + (1 - final) * (1 + math.cos(math.pi * p)) / 2)


def weight_decay(step: int, steps: int, first: float, last: float) -> float:
    """Return the weight decay of a step: a half cosine from `first` to `last` over all steps."""
    p = step / max(steps - 1, 1)
    return last + (first - last) * (1 + math.cos(math.pi * p)) / 2
