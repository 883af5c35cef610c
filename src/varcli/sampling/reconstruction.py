"""The tokenizer alone: images to token maps, token maps to images, and what is lost on the way.

Shapes: B images, P pixels per side, l tokens of one scale. Token maps are (B, l) int64, one per scale.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varcli.config import TokenizerConfig, sequence_length
from varcli.models.tokenizer import Tokenizer
from varcli.sampling.sampler import Pixels, decode


@torch.inference_mode()
def encode(tokenizer: Tokenizer, pixels_BPP3: Pixels | NDArray[np.float32]) -> list[Tensor]:
    """Return the token maps of images of the tokenizer's size, levels from 0 to 255."""
    return tokenizer.quantize.quantize(features(tokenizer, pixels_BPP3)).tokens


@torch.inference_mode()
def features(tokenizer: Tokenizer, pixels_BPP3: Pixels | NDArray[np.float32]) -> Tensor:
    """Return the feature maps (B, C, H, W) of images of the tokenizer's size, levels from 0 to 255."""
    device = tokenizer.quant_conv.weight.device
    image_B3PP = torch.from_numpy(pixels_BPP3.copy()).permute(0, 3, 1, 2).to(device) / 127.5 - 1
    return tokenizer.features(image_B3PP)


@torch.inference_mode()
def growth(tokenizer: Tokenizer, tokens: Sequence[Tensor]) -> Iterator[Pixels]:
    """Yield the image (P, P, 3) of the first scale alone, of the first two, and so on to that of all given."""
    for f_hat_1CHW in tokenizer.quantize.f_hats(tokens):
        yield decode(tokenizer, f_hat_1CHW)[0]


@torch.inference_mode()
def rebuilt(tokenizer: Tokenizer, tokens: Sequence[Tensor]) -> Pixels:
    """Return the image (P, P, 3) of token maps; the last ones may be missing."""
    return decode(tokenizer, tokenizer.quantize.f_hats(tokens)[-1])[0]


@torch.inference_mode()
def there_and_back(tokenizer: Tokenizer, before_BPP3: Pixels) -> tuple[Pixels, list[Tensor]]:
    """Reconstruct images of the tokenizer's size; also return their token maps (B, l)."""
    quantized = tokenizer.quantize.quantize(features(tokenizer, before_BPP3))
    return decode(tokenizer, quantized.f_hats[-1]), quantized.tokens


def psnr(pixels: Pixels, other: Pixels) -> float:
    """Return the peak signal-to-noise ratio of two images in dB; infinite if they are equal."""
    error = float(np.square(pixels.astype(np.float64) - other).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def bits_per_pixel(config: TokenizerConfig) -> float:
    """Size of an image's tokens where each is the index of a codebook row, log2 V bits."""
    return sequence_length(config.sides) * math.log2(config.codebook_size) / config.pixels**2
