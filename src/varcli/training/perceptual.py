"""Perceptual losses of tokenizer training: how far apart two images are to a network that knows images.

LPIPS compares features of VGG16 (Zhang et al. 2018). The others compare what an ImageNet classifier makes of both
images, its features at several depths and its logits, as MaskBit does with ResNet-50 (arXiv 2409.16211).

Shapes: B images of P × P pixels in [-1, 1], C channels and H × W positions of one feature map, N classes.
"""

from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.errors import CheckpointError
from varcli.models.efficientnet import EfficientNetLite0
from varcli.models.lpips import LPIPS, read_weights

RESNET50_FILE = "resnet50-11ad3fa6.pth"
RESNET50_URL = f"https://download.pytorch.org/models/{RESNET50_FILE}"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, for pixels in [0, 1]."""
SHIFT = 4
"""Both images move by up to this many pixels, so that no pattern tied to the network's grid pays."""


class Network(Protocol):
    """A classifier that shows its inner maps."""

    def activations(self, image_B3PP: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return feature maps (B, C, H, W) of several depths, and logits (B, N)."""


class ClassifierDistance(nn.Module):
    """Mean squared difference of unit-length features at every depth, and of the logits, unit-length too."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, made_B3PP: Tensor, image_B3PP: Tensor) -> Tensor:
        """Return the mean distance of two batches: 0 where they are equal, 4 at most."""
        made_B3PP, image_B3PP = moved(made_B3PP, image_B3PP)
        with torch.no_grad():
            wanted, wanted_logits_BN = self.network.activations(image_B3PP)
        found, logits_BN = self.network.activations(made_B3PP)
        # Logits are compared without their mean, which softmax does not heed.
        pairs = [*zip(found, wanted, strict=True), (centred(logits_BN), centred(wanted_logits_BN))]
        return torch.stack([unit_distance(made, image) for made, image in pairs]).mean()


def unit_distance(made: Tensor, image: Tensor) -> Tensor:
    """Mean over all positions of the squared distance of unit-length vectors along the channels, in [0, 4]."""
    return (F.normalize(made.float(), dim=1) - F.normalize(image.float(), dim=1)).square().sum(1).mean()


def centred(logits_BN: Tensor) -> Tensor:
    """Return logits whose mean over the classes is 0."""
    return logits_BN - logits_BN.mean(1, keepdim=True)


def moved(*images: Tensor) -> list[Tensor]:
    """Return batches of images all moved by the same random pixels, reflected at the borders."""
    across, down = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    side = images[0].shape[-1]
    if side <= SHIFT:  # too small to reflect
        return list(images)
    padded = [F.pad(image, (SHIFT,) * 4, mode="reflect") for image in images]
    return [image[:, :, down : down + side, across : across + side] for image in padded]


class ResNet50(nn.Module):
    """torchvision's ResNet-50 on images in [-1, 1]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, folder: Path) -> None:
        """Load the weights from a folder.

        Raises:
            CheckpointError: the file is missing or not what its name says.
        """
        from torchvision.models import resnet50

        super().__init__()
        weights = read_weights(folder / RESNET50_FILE, RESNET50_URL, RESNET50_FILE[-12:-4])
        with torch.device("meta"):
            self.network = resnet50(weights=None)
        try:
            self.network.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{folder / RESNET50_FILE} is not ResNet-50; get it from {RESNET50_URL}") from error
        self.register_buffer("mean", 2 * torch.tensor(MEAN).view(1, 3, 1, 1) - 1)
        self.register_buffer("deviation", 2 * torch.tensor(DEVIATION).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def activations(self, image_B3PP: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of the four stages, and the logits (B, N)."""
        net = self.network
        h_BCHW = net.maxpool(net.relu(net.bn1(net.conv1((image_B3PP - self.mean) / self.deviation))))
        maps = []
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            h_BCHW = stage(h_BCHW)
            maps.append(h_BCHW)
        return maps, net.fc(net.avgpool(h_BCHW).flatten(1))


def perceptual_distance(name: str, folder: Path) -> nn.Module:
    """Return a perceptual loss by name.

    Args:
        name: one of `config.PERCEPTUAL`, not "none".
        folder: where downloaded weights of LPIPS and ResNet-50 lie; EfficientNet-lite0 is a package.

    Raises:
        CheckpointError: the weights are missing or damaged.
        UsageError: a package is not installed.
    """
    if name == "efficientnet-lite0":
        return ClassifierDistance(EfficientNetLite0())
    try:
        return LPIPS(folder) if name == "lpips" else ClassifierDistance(ResNet50(folder))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or train with another --perceptual") from error
