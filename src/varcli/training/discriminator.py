"""The adversarial part of the tokenizer's loss: a patch discriminator that sees augmented images.

Shapes: B images of P × P pixels, h × w patches.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from varcli.distributed import ProcessGroup
from varcli.training.parallel import Rows, mean_over_ranks

MAX_WEIGHT = 1e4
SMALLEST_PATCH = 8
"""Least pixels per side of an image: three convolutions halve it."""


class PatchDiscriminator(nn.Module):
    """Judges whether each patch is real (Isola et al. 2017); spectral norm bounds its gradient."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(width_in, width_out, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))

    def forward(self, image_B3PP: Tensor) -> Tensor:
        """Return one number per patch, (B, 1, h, w), positive where it looks real."""
        return self.layers(image_B3PP)


def augment(image_B3PP: Tensor, part: Rows | None = None) -> Tensor:
    """Return images with random brightness, saturation, contrast, shift and one square cut out.

    The same kind of change to real images and reconstructions keeps a discriminator from memorizing a small data set,
    and the gradient passes through.

    Args:
        image_B3PP: a batch of images, or a part of one.
        part: its rows of the batch; None is a whole batch.

    Source: DiffAugment (Zhao et al. 2020).
    """
    batch, _, pixels, _ = image_B3PP.shape
    part = part or Rows(0, batch, batch)
    device = image_B3PP.device
    bright, saturate, contrast = part.of(torch.rand(3, part.total, 1, 1, 1, device=device), 1)
    x = image_B3PP + (bright - 0.5)
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * (2 * saturate) + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (contrast + 0.5) + mean
    rows = torch.arange(pixels, device=device)
    shift_2B1 = part.of(torch.randint(-(pixels // 8), pixels // 8 + 1, (2, part.total, 1), device=device), 1)
    from_2BP = rows + shift_2B1
    inside_2BP = (from_2BP >= 0) & (from_2BP < pixels)
    y, x_ = from_2BP.clamp(0, pixels - 1)
    image = torch.arange(batch, device=device)[:, None, None]
    shifted = x.permute(0, 2, 3, 1)[image, y[:, :, None], x_[:, None, :]].permute(0, 3, 1, 2)
    corner_2B1 = part.of(torch.randint(-(pixels // 4), pixels, (2, part.total, 1), device=device), 1)
    cut_2BP = (rows >= corner_2B1) & (rows < corner_2B1 + pixels // 2)
    keep_BPP = (inside_2BP[0, :, :, None] & inside_2BP[1, :, None, :]) & ~(
        cut_2BP[0, :, :, None] & cut_2BP[1, :, None, :]
    )
    return shifted * keep_BPP[:, None]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss that asks for real > 1 and fake < -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(
    decoded_B3PP: Tensor, last_layer: Tensor, pull_B3PP: Tensor, push_B3PP: Tensor, group: ProcessGroup | None = None
) -> Tensor:
    """Return the factor of the adversarial loss that gives both losses equal gradients at the last layer.

    Args:
        decoded_B3PP: what the decoder returned.
        last_layer: the weight of its last layer.
        pull_B3PP: gradient of the reconstruction loss with respect to the pixels.
        push_B3PP: gradient of the adversarial loss with respect to the pixels.
        group: the ranks, whose gradients are averaged; None is this process alone.

    Source: VQGAN (Esser et al. 2021), equation 7.
    """
    gradients = [
        torch.autograd.grad(decoded_B3PP, last_layer, gradient_B3PP, retain_graph=True)[0]
        for gradient_B3PP in (pull_B3PP, push_B3PP)
    ]
    pull, push = mean_over_ranks(gradients, group or ProcessGroup())
    return (pull.norm() / (push.norm() + 1e-4)).clamp(max=MAX_WEIGHT).detach()
