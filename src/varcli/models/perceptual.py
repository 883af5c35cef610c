"""Perceptual distances: how far apart two images are to a network that knows images. All are differentiable.

LPIPS compares features of VGG16 (Zhang et al. 2018). The others compare what an ImageNet classifier computes from both
images, its features at several depths and its logits, as MaskBit does with ResNet-50 (arXiv 2409.16211).

Published files of weights are read without unpickling code.

Shapes: B images of P × P pixels in [-1, 1], C channels and H × W positions of one feature map, N classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.errors import CheckpointError
from varcli.files import file_sha256
from varcli.models.efficientnet import EfficientNetLite0

# --- LPIPS -----------------------------------------------------------------------------------------

VGG_FILE = "vgg16-397923af.pth"
LINEAR_FILE = "weights-vgg16-lpips.pth"
SOURCES = {
    VGG_FILE: "https://download.pytorch.org/models/vgg16-397923af.pth",
    LINEAR_FILE: "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
}
VGG_SHA256 = "397923af"
"""First digits, as in the file's name; the other file's hash is not published."""
STAGES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))
"""Layers of VGG16 up to each of the five activations compared."""
LPIPS_MEAN = (-0.030, -0.088, -0.188)
LPIPS_DEVIATION = (0.458, 0.448, 0.450)
"""ImageNet's, for pixels in [-1, 1]."""


class LPIPS(nn.Module):
    """LPIPS with VGG16: squared difference of unit-length features, weighted by channel."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: nn.Sequential, weights: Sequence[Tensor]) -> None:
        """Take VGG16's layers, and the weights of the channels of each stage, (1, C, 1, 1)."""
        super().__init__()
        for layer in features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # each stage's output is compared before the next one sees it
        self.stages = nn.ModuleList(features[first:last] for first, last in STAGES)
        self.weights = nn.ParameterList(weights)
        self.register_buffer("mean", torch.tensor(LPIPS_MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(LPIPS_DEVIATION).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, made_B3PP: Tensor, image_B3PP: Tensor) -> Tensor:
        """Return the mean distance of images in [-1, 1], 0 where they are equal."""
        with torch.no_grad():
            wanted = self.activations(image_B3PP)
        total = torch.zeros((), device=made_B3PP.device)
        for made, image, weight_1C11 in zip(self.activations(made_B3PP), wanted, self.weights, strict=True):
            total = total + ((made - image).square() * weight_1C11).sum(1).mean()
        return total

    def activations(self, image_B3PP: Tensor) -> list[Tensor]:
        """Return the five maps compared, (B, C, H, W), of length 1 at every position."""
        h_BCHW = (image_B3PP - self.mean) / self.deviation
        found = []
        for stage in self.stages:
            h_BCHW = stage(h_BCHW)
            found.append(F.normalize(h_BCHW.float(), dim=1))
        return found


def load_lpips(folder: Path) -> LPIPS:
    """Return LPIPS with both files of weights from a folder.

    Raises:
        CheckpointError: a file is missing or not what its name says.
    """
    from torchvision.models import vgg16

    vgg = read_weights(folder / VGG_FILE, SOURCES[VGG_FILE], VGG_SHA256)
    linear = read_weights(folder / LINEAR_FILE, SOURCES[LINEAR_FILE])
    with torch.device("meta"):
        features = vgg16(weights=None, init_weights=False).features
    features.load_state_dict(
        {name.removeprefix("features."): tensor for name, tensor in vgg.items() if name.startswith("features.")},
        assign=True,
    )
    return LPIPS(features, [linear[f"lin{i}.model.1.weight"] for i in range(len(STAGES))])


# --- distances by classifiers ----------------------------------------------------------------------

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
            raise CheckpointError(f"{folder / RESNET50_FILE} is not ResNet-50: get it from {RESNET50_URL}") from error
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


# --- by name ---------------------------------------------------------------------------------------


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
        return load_lpips(folder) if name == "lpips" else ClassifierDistance(ResNet50(folder))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or train with another --perceptual") from error


def read_weights(path: Path, url: str, sha256_start: str = "") -> dict[str, Tensor]:
    """Return a published file of weights, tensors only.

    Args:
        path: where it should lie.
        url: where it is published.
        sha256_start: first digits of its hash, if they are published.

    Raises:
        CheckpointError: it is missing, damaged, or no file of weights.
    """
    if not path.is_file():
        raise CheckpointError(f"the weights {path} are missing: put {url} there")
    if not file_sha256(path).startswith(sha256_start):
        raise CheckpointError(f"the weights {path} are damaged: download them again from {url}")
    try:
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a foreign file
        raise CheckpointError(f"the weights {path} cannot be read: download them again from {url}") from error
    return tensors
