"""The perceptual distance LPIPS on VGG16 features (Zhang et al. 2018), differentiable.

Two published files of weights are needed: torchvision's VGG16 and the five linear layers that
torch-fidelity re-hosts. They are read without unpickling code.

Shapes: B images of P × P pixels, C channels and H × W positions of one feature map.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.errors import CheckpointError
from varcli.files import file_sha256

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
MEAN = (-0.030, -0.088, -0.188)
DEVIATION = (0.458, 0.448, 0.450)
"""ImageNet's, for pixels in [-1, 1]."""


class LPIPS(nn.Module):
    """LPIPS with VGG16: squared difference of unit-length features, weighted by channel."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, folder: Path) -> None:
        """Load both files of weights from a folder.

        Raises:
            CheckpointError: a file is missing or not what its name says.
        """
        from torchvision.models import vgg16

        super().__init__()
        weights = {
            name.removeprefix("features."): tensor
            for name, tensor in read_weights(folder / VGG_FILE, SOURCES[VGG_FILE], VGG_SHA256).items()
            if name.startswith("features.")
        }
        with torch.device("meta"):
            features = vgg16(weights=None, init_weights=False).features
        features.load_state_dict(weights, assign=True)
        for layer in features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # each stage's output is compared before the next one sees it
        self.stages = nn.ModuleList(features[first:last] for first, last in STAGES)
        linear = read_weights(folder / LINEAR_FILE, SOURCES[LINEAR_FILE])
        self.weights = nn.ParameterList(linear[f"lin{i}.model.1.weight"] for i in range(len(STAGES)))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1))
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
        raise CheckpointError(f"weights: {path} is missing; put {url} there")
    if not file_sha256(path).startswith(sha256_start):
        raise CheckpointError(f"weights: {path} is damaged; download it again from {url}")
    try:
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a foreign file
        raise CheckpointError(f"weights: {path} cannot be read; download it again from {url}") from error
    return tensors
