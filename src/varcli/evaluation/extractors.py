"""Features of images by torch-fidelity's InceptionV3, the port of TensorFlow's that published figures rest on.

The network is torch-fidelity's; what runs it is faster: normalization is folded into the convolutions, which
on a CPU are oneDNN's with weights laid out beforehand, and the resizing is done one axis after the other. The
features agree to float32's rounding, the figures to six digits and more.

Shapes: B images, H × W pixels, N features of the last pooling, V classes of the network's own, O × C × K × L
the weights of a convolution.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from varcli.errors import CheckpointError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # whatever is deprecated in what it imports is not our user's affair
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

Pixels = NDArray[np.uint8]
"""uint8, (B, H, W, 3)."""

SIDE = FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE
"""Pixels a side that the network sees."""

BATCHES = {"cpu": 4}
"""Images at a time by kind of device: on a CPU as many as its caches like."""

LARGE_BATCH = 128
"""Images at a time elsewhere."""


@dataclass(frozen=True, slots=True)
class Features:
    """What the metrics see of some images, on the device where it was computed."""

    pool_BN: Tensor
    """The last pooling, float32 (B, 2048): for FID, KID, precision and recall."""
    logits_BV: Tensor
    """Class scores without the bias, float32 (B, 1008): for the inception score."""


class Inception:
    """The network, with weights from a file that is read without running any code in it."""

    name = "inception-v3-compat"
    """What torch-fidelity calls it."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Read the weights and move them to a device.

        Raises:
            CheckpointError: the file cannot be read, or is not this network's.
        """
        content = _read(weights)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.device = device
        network = _network(weights, content)
        *blocks, _ = network.children()  # in the order of its forward pass; the last one is its classifier
        self._trunk = _folded(nn.Sequential(*blocks)).to(device).to(memory_format=torch.channels_last)
        self._classifier_VN = network.fc.weight.to(device)
        self._batch = BATCHES.get(device.type, LARGE_BATCH)

    @torch.inference_mode()
    def features(self, pixels_BHW3: Pixels) -> Features:
        """Return the features of images of any size; on a GPU without waiting for it."""
        pixels = torch.from_numpy(np.ascontiguousarray(pixels_BHW3))
        found = [self._pool(part.to(self.device, non_blocking=True)) for part in pixels.split(self._batch)]
        pool_BN = torch.cat(found)
        return Features(pool_BN, F.linear(pool_BN, self._classifier_VN))

    def _pool(self, pixels_BHW3: Tensor) -> Tensor:
        """Return the pooled features of one batch."""
        x_BHW3 = (resized(pixels_BHW3.float()) - 128) / 128
        # TensorFloat-32, cuDNN's default, would leave three digits of the figures.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            pool_BN11: Tensor = self._trunk(x_BHW3.permute(0, 3, 1, 2))
        return pool_BN11.flatten(1)


def resized(pixels_BHW3: Tensor) -> Tensor:
    """Return images at the network's size, levels from 0 to 255, by TensorFlow 1's bilinear rule.

    Equal to the last bit to torch-fidelity's `interpolate_bilinear_2d_like_tensorflow1x`, which gathers all
    four neighbours of each pixel; along the width first, then along the height, is the same with less.
    """
    for axis in (2, 1):
        size = pixels_BHW3.shape[axis]
        place = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(size / SIDE, dtype=torch.float32)
        low = place.long()
        weight = (place - low).view(-1, *[1] * (3 - axis)).to(pixels_BHW3.device)
        below = pixels_BHW3.index_select(axis, low.to(pixels_BHW3.device))
        above = pixels_BHW3.index_select(axis, (low + 1).clamp_max(size - 1).to(pixels_BHW3.device))
        pixels_BHW3 = below + (above - below) * weight
    return pixels_BHW3


# --- convolutions ----------------------------------------------------------------------------------


class FoldedConvolution(nn.Module):
    """Convolution, normalization and ReLU in one."""

    weight_OCKL: Tensor
    bias_O: Tensor

    def __init__(self, block: BasicConv2d) -> None:
        super().__init__()
        norm, convolution = block.bn, block.conv
        gain_O = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight_OCKL = convolution.weight.double() * gain_O[:, None, None, None]
        self.register_buffer("weight_OCKL", weight_OCKL.float())
        self.register_buffer("bias_O", (norm.bias - norm.running_mean * gain_O).float())
        self.stride, self.padding = list(convolution.stride), list(convolution.padding)
        self.packed: Tensor | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the result, by oneDNN on a CPU that has it."""
        if x_BCHW.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return F.relu_(F.conv2d(x_BCHW, self.weight_OCKL, self.bias_O, self.stride, self.padding))
        shape = self.padding, self.stride, [1, 1], 1
        if self.packed is None:
            arrange = torch.ops.mkldnn._reorder_convolution_weight
            self.packed = arrange(self.weight_OCKL, *shape, list(x_BCHW.shape))
        convolve = torch.ops.mkldnn._convolution_pointwise
        result_BCHW: Tensor = convolve(x_BCHW, self.packed, self.bias_O, *shape, "relu", [], "")
        return result_BCHW


def _folded(module: nn.Sequential) -> nn.Sequential:
    """Return the network with a folded convolution in the place of each of its blocks."""
    for parent, name, block in _blocks(module):
        setattr(parent, name, FoldedConvolution(block))
    return module


def _blocks(module: nn.Module) -> Iterator[tuple[nn.Module, str, BasicConv2d]]:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BasicConv2d):
                yield parent, name, child


# --- the file --------------------------------------------------------------------------------------


def _read(weights: Path) -> bytes:
    try:
        return weights.read_bytes()
    except OSError as error:
        raise CheckpointError(f"inception weights: {weights}; cannot be read: {error.strerror or error}") from error


def _network(weights: Path, content: bytes) -> FeatureExtractorInceptionV3:
    """Return torch-fidelity's network; it unpickles whatever it is given, so it gets a copy of the tensors alone."""
    copy = io.BytesIO()
    try:
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        torch.save({name: tensor.float() for name, tensor in tensors.items()}, copy)
        copy.seek(0)
        asked = ["2048", "logits_unbiased"]
        return FeatureExtractorInceptionV3(Inception.name, asked, feature_extractor_weights_path=copy)
    except Exception as error:  # torch raises many kinds for a foreign file
        raise CheckpointError(
            f"inception weights: {weights}; not the state dict of torch-fidelity's {Inception.name}"
        ) from error
