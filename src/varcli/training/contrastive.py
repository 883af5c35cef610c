"""Condition contrastive alignment (CCA): a fine-tuning after which samples need no guidance, at half the cost.

Source: arXiv 2410.09347, equation 12: -log σ(r(x, c)) - λ log σ(-r(x, c')), where r = β log(p_θ(x|c) / p_φ(x|c)), φ
are the weights before, and c' is another label. Differs: divided by 1 + λ, to which Adam is indifferent; c' is drawn
from all other classes alike, whereas the paper shuffles the labels of a batch.

Shapes: B images, L tokens of all scales.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.training.parallel import Rows


def other_labels(label_B: Tensor, classes: int, rows: Rows) -> Tensor:
    """Return for each label one of the other classes, drawn from torch's global generator for the whole batch."""
    shift_B = torch.randint(1, max(classes, 2), (rows.total,), device=label_B.device)
    return (label_B + rows.of(shift_B)) % classes


def contrastive_loss(
    own_BL: Tensor, other_BL: Tensor, own_before_BL: Tensor, other_before_BL: Tensor, weight: float, beta: float
) -> Tensor:
    """Return the mean loss of a batch.

    Args:
        own_BL: cross-entropy of each token under the image's label.
        other_BL: under another label.
        own_before_BL: under the image's label, by the weights before fine-tuning.
        other_before_BL: under the other label, by the weights before.
        weight: λ.
        beta: β.
    """
    own_B = beta * (own_before_BL - own_BL).sum(1)
    other_B = beta * (other_before_BL - other_BL).sum(1)
    return (F.softplus(-own_B) + weight * F.softplus(other_B)).mean() / (1 + weight)
