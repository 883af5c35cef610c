"""Feature extractors: networks that compute the features of metrics. One class each, listed in `EXTRACTORS`.

Shapes: B images, H × W pixels, N features, V classes of the network's own, F spatial features, O × C × K × L the
weights of a convolution.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from varcli.acceleration.onednn import PackedConvolution
from varcli.errors import CheckpointError, UsageError
from varcli.evaluation.statistics import FeatureShape
from varcli.models.efficientnet import EfficientNetLite0

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations in its imports do not concern our user
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

Pixels = NDArray[np.uint8]
"""uint8, (B, H, W, 3)."""

SIDE = FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE
"""Pixels per side of the network's input."""

BATCHES = {"cpu": 4}
"""Images at a time by kind of device: on a CPU as many as fit its caches."""

LARGE_BATCH = 128
"""Images at a time elsewhere."""


@dataclass(frozen=True, slots=True)
class Features:
    """Features of some images, float32, on the device where they were computed."""

    pool_BN: Tensor
    """For Fréchet distances, KID, precision and recall."""
    logits_BV: Tensor | None = None
    """Class scores without the bias: for the inception score."""
    spatial_BF: Tensor | None = None
    """Features with their positions: for sFID."""


class Extractor(Protocol):
    """A network that computes features, with weights from a file that is read without running any code in it."""

    name: str
    """As `--features` takes it."""
    figure: str
    """Name of its Fréchet distance in results."""
    shape: FeatureShape
    downloaded: bool
    """Whether its weights are downloaded, and not in a package."""
    sha256: str
    """Of the weights file."""
    device: torch.device

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        """Read the weights, None being those of a package, and move them to a device.

        Raises:
            CheckpointError: the file cannot be read, or is not this network's.
        """

    def features(self, pixels_BHW3: Pixels) -> Features:
        """Features of images of any size; on a GPU without waiting for it."""


# --- Inception -------------------------------------------------------------------------------------


class Inception:
    """torch-fidelity's InceptionV3, a port of the TensorFlow network behind published figures.

    The network is torch-fidelity's, but runs faster: normalization is folded into the convolutions, which on a CPU are
    oneDNN's with packed weights, and images are resized one axis after the other. The features agree within float32
    rounding, the figures to six digits and more.

    Its spatial features are ADM's: the first 7 channels of the 1 × 1 branch of the 17 × 17 block Mixed_6d, which
    TensorFlow's graph calls mixed_6/conv, in the order of that graph, row by row and channels last (arXiv 2103.03841).
    """

    name = "inception-v3-compat"
    """What torch-fidelity calls it."""
    figure = "fid"
    shape = FeatureShape(pool=2048, classes=1008, spatial=17 * 17 * 7)
    downloaded = True

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
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)  # by now the folded one
        self._classifier_VN = network.fc.weight.to(device)
        self._batch = BATCHES.get(device.type, LARGE_BATCH)

    @torch.inference_mode()
    def features(self, pixels_BHW3: Pixels) -> Features:
        """Features of images of any size; on a GPU without waiting for it."""
        pixels = torch.from_numpy(np.ascontiguousarray(pixels_BHW3))
        self._spatial: list[Tensor] = []
        pool_BN = torch.cat([self._pool(part.to(self.device, non_blocking=True)) for part in pixels.split(self._batch)])
        return Features(pool_BN, F.linear(pool_BN, self._classifier_VN), torch.cat(self._spatial))

    def _keep_spatial(self, block: nn.Module, inputs: object, branch_BCHW: Tensor) -> None:
        self._spatial.append(branch_BCHW[:, :7].permute(0, 2, 3, 1).flatten(1))

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
    four neighbours of each pixel; along the width first, then along the height, gives the same with less work.
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
        self.packed = PackedConvolution(self.weight_OCKL, self.bias_O, self.stride, self.padding)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The output, by oneDNN on a CPU that has it."""
        if x_BCHW.device.type == "cpu" and torch.backends.mkldnn.is_available():
            return self.packed(x_BCHW)
        return F.relu_(F.conv2d(x_BCHW, self.weight_OCKL, self.bias_O, self.stride, self.padding))


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


def _read(weights: Path) -> bytes:
    try:
        return weights.read_bytes()
    except OSError as error:
        raise CheckpointError(f"the weights {weights} cannot be read: {error.strerror or error}") from error


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
            f"the weights {weights} are not the state dict of torch-fidelity's {Inception.name}"
        ) from error


# --- DINOv2 ----------------------------------------------------------------------------------------


class DinoV2:
    """DINOv2's class token, whose Fréchet distance is FD-DINOv2; the published figures are those of ViT-L/14.

    Images are resized to 224 pixels by Pillow's bicubic filter and normalized with ImageNet's mean and deviation.

    Source: Stein et al. 2023, "Exposing flaws of generative model evaluation metrics", arXiv 2306.04675. The network is
    timm's ViT; the position embedding of 37 × 37 patches is interpolated to 16 × 16 as DINOv2's own code does it.
    """

    name = "dinov2"
    figure = "fd_dinov2"
    shape = FeatureShape(pool=1024)
    downloaded = True
    side: ClassVar = 224
    """Pixels per side of the network's input."""
    patch: ClassVar = 14

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Read the weights of dinov2_vitl14_pretrain.pth, or of another size of ViT, and move them to a device.

        Raises:
            UsageError: timm is not installed.
            CheckpointError: the file cannot be read, or is not this network's.
        """
        try:
            from timm.models.vision_transformer import VisionTransformer
        except ImportError:
            raise UsageError("--features dinov2 needs another package: pip install 'varcli[dinov2]'") from None
        content = _read(weights)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.device = device
        try:
            tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            width = tensors["cls_token"].shape[-1]
            depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
            tensors["pos_embed"] = _interpolated(tensors["pos_embed"], self.side // self.patch)
            tensors.pop("mask_token", None)  # of training alone
            network = VisionTransformer(
                img_size=self.side,
                patch_size=self.patch,
                embed_dim=width,
                depth=depth,
                num_heads=width // 64,
                init_values=1e-5,
                num_classes=0,
            )
            network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except Exception as error:  # torch raises many kinds for a foreign file
            raise CheckpointError(f"the weights {weights} are not the state dict of DINOv2") from error
        self.shape = FeatureShape(pool=width)
        self._network = network.eval().requires_grad_(False).to(device)
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self._mean, self._deviation = (torch.tensor(level).view(3, 1, 1).to(device) for level in (mean, deviation))
        self._batch = BATCHES.get(device.type, LARGE_BATCH)

    @torch.inference_mode()
    def features(self, pixels_BHW3: Pixels) -> Features:
        """The class tokens of images of any size."""
        size = (self.side, self.side)
        resized_B = [
            np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)) for pixels in pixels_BHW3
        ]
        pixels = torch.from_numpy(np.stack(resized_B)).permute(0, 3, 1, 2)
        tokens = []
        for part in pixels.split(self._batch):
            image_B3PP = (part.to(self.device).float() / 255 - self._mean) / self._deviation
            tokens.append(self._network.forward_features(image_B3PP)[:, 0])
        return Features(torch.cat(tokens))


def _interpolated(position_1LD: Tensor, side: int) -> Tensor:
    """DINOv2's position embedding for side × side patches: bicubic, with the offset of 0.1 its own code has."""
    own, patches_1ND = position_1LD[:, :1].float(), position_1LD[:, 1:].float()
    trained = round(patches_1ND.shape[1] ** 0.5)
    patches_1DHW = patches_1ND.unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / trained
    patches_1Dss = F.interpolate(patches_1DHW, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([own, patches_1Dss.flatten(2).transpose(1, 2)], dim=1)


# --- EfficientNet ----------------------------------------------------------------------------------


class EfficientNet:
    """EfficientNet-lite0, whose weights are a package: for class agreement, and for FD where nothing can be downloaded.

    Its features are the input of its last layer: 1280 averages over the image.
    """

    name = "efficientnet-lite0"
    figure = "fd_efficientnet"
    shape = FeatureShape(pool=1280, classes=1000, imagenet=True)
    downloaded = False

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        """Read the package's weights, or those of a file like it, and move them to a device.

        Raises:
            UsageError: the packages are not installed.
            CheckpointError: the file is not this network's.
        """
        network = EfficientNetLite0(weights)
        self.sha256, self.device = network.sha256, device
        self._network = network.to(device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def features(self, pixels_BHW3: Pixels) -> Features:
        """Features and ImageNet's logits of images of any size."""
        image_B3HW = torch.from_numpy(pixels_BHW3).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return Features(*self._network.pooled(image_B3HW.contiguous(memory_format=torch.channels_last)))


# --- no network ------------------------------------------------------------------------------------


class NoFeatures:
    """No network: for a tokenizer's PSNR, SSIM and LPIPS, which are measured on pixels."""

    name = "none"
    figure = "fid"
    shape = FeatureShape(pool=0)
    downloaded = False
    sha256 = ""

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        """Read nothing."""
        self.device = device

    def features(self, pixels_BHW3: Pixels) -> Features:
        """Return no features, (B, 0)."""
        return Features(torch.zeros(len(pixels_BHW3), 0))


EXTRACTORS: dict[str, type[Any]] = {
    extractor.name: extractor for extractor in (Inception, DinoV2, EfficientNet, NoFeatures)
}
"""All extractors by name; those that are downloaded have their weights under `[weights]` in checkpoints.toml."""
