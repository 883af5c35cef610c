"""Features of pictures by torch-fidelity's InceptionV3, the port of TensorFlow's that published figures rest on.

Shapes: B pictures, H × W pixels, N features of the last pooling, V classes of the network's own.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorInceptionV3

from varcli.errors import CheckpointError

Pixels = NDArray[np.uint8]
"""uint8, (B, H, W, 3)."""

NAME = "inception-v3-compat"
"""What torch-fidelity calls this network."""


@dataclass(frozen=True, slots=True)
class Features:
    """What the metrics see of a batch of pictures, on the device where it was computed."""

    pool_BN: Tensor
    """The last pooling, float32 (B, 2048): for FID, KID, precision and recall."""
    logits_BV: Tensor
    """Class scores without the bias, float32 (B, 1008): for the inception score."""


class Inception:
    """The network, with weights from a file that is read without running any code in it."""

    name = NAME

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Read the weights and move them to a device.

        Raises:
            CheckpointError: the file cannot be read, or is not this network's.
        """
        content = _content(weights)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.device = device
        network = _network(weights, content)
        *trunk, _ = network.children()  # in the order of its forward pass; the last one is its classifier
        self._trunk = nn.Sequential(*trunk).to(device)
        self._classifier_VN = network.fc.weight.to(device)

    @torch.inference_mode()
    def features(self, pixels_BHW3: Pixels) -> Features:
        """Return the features of pictures of any size."""
        raise NotImplementedError


def _content(weights: Path) -> bytes:
    try:
        return weights.read_bytes()
    except OSError as error:
        raise CheckpointError(f"inception weights: {weights}; cannot be read: {error.strerror or error}") from error


def _network(weights: Path, content: bytes) -> FeatureExtractorInceptionV3:
    """Return torch-fidelity's network; it unpickles what it is given, so that it gets our copy of the tensors."""
    try:
        found: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        copy = io.BytesIO()
        torch.save({name: tensor.float() for name, tensor in found.items()}, copy)
        copy.seek(0)
        return FeatureExtractorInceptionV3(NAME, ["2048", "logits_unbiased"], feature_extractor_weights_path=copy)
    except Exception as error:
        raise CheckpointError(f"inception weights: {weights}; not {NAME} of torch-fidelity") from error
