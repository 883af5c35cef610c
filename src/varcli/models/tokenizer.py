"""The tokenizer: images to token maps and back.

Shapes: B images, C codebook channels, H = W = s_K, P = H · downsampling pixels per side,
l tokens of one scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.config import TokenizerConfig, progress_ratio
from varcli.models.autoencoder import Decoder, Encoder


@dataclass(frozen=True, slots=True)
class Quantized:
    """Result of quantizing a feature map."""

    tokens: list[Tensor]
    """Token map of each scale, (B, l) int64."""
    f_hats: list[Tensor]
    """Running sum after each scale, (B, C, H, W)."""
    residuals: list[Tensor]
    """What each scale's tokens approximate, (B, l, C) without gradient."""


class PhiConvs(nn.Module):
    """The convolutions φ, shared among scales: φ(h) = h/2 + conv(h)/2."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(count))

    def forward(self, h_BCHW: Tensor, ratio: float) -> Tensor:
        """Return φ(h) for the scale at `ratio` = k/(K-1) of the way."""
        return 0.5 * h_BCHW + 0.5 * self.qresi_ls[nearest_tick(ratio, len(self.qresi_ls))](h_BCHW)


def nearest_tick(ratio: float, count: int) -> int:
    """Which of `count` values spread evenly over [1/12, 11/12] lies nearest to `ratio`.

    For n other than 4 the ends are 1/(2n) and 1 - 1/(2n). Ties go to the first, but the middle scale of
    an odd number of them is no tie in float64: numpy's rounding decides there, as it did in the original.

    Source: the released checkpoints.
    """
    end = 1 / 3 / count if count == 4 else 1 / 2 / count
    return int(np.argmin(np.abs(np.linspace(end, 1 - end, count) - ratio)))


class Quantizer(nn.Module):
    """Feature map to token maps and back, residual by residual (paper, algorithms 1 and 2)."""

    ema_vocab_hit_SV: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.sides = config.sides
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_width)
        self.quant_resi = PhiConvs(config.codebook_width, config.kernel_count)
        for scale, side in enumerate(config.sides):
            up_Hs, down_sH = resizing(side, config.sides[-1], "bicubic"), resizing(config.sides[-1], side, "area")
            self.register_buffer(f"upsampling_{scale}", up_Hs, persistent=False)
            self.register_buffer(f"averaging_{scale}", down_sH, persistent=False)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(config.sides), config.codebook_size))

    def embed(self, idx_Bl: Tensor) -> Tensor:
        """Return the codebook rows of a token map as (B, C, s, s)."""
        side = round(idx_Bl.shape[1] ** 0.5)
        return self.embedding(idx_Bl).transpose(1, 2).unflatten(2, (side, side))

    def accumulate(self, f_hat_BCHW: Tensor | None, h_BCss: Tensor, scale: int) -> Tensor:
        """Return f_hat after a scale: f_hat + φ_k(h upsampled to H × W). None stands for f_hat = 0.

        Source: algorithm 1, lines 9 to 11, and algorithm 2.
        """
        up_Hs: Tensor = getattr(self, f"upsampling_{scale}")
        if scale + 1 < len(self.sides):
            h_BCss = up_Hs @ h_BCss @ up_Hs.T
        h_BCHW = self.quant_resi(h_BCss, progress_ratio(scale, len(self.sides)))
        return h_BCHW if f_hat_BCHW is None else f_hat_BCHW + h_BCHW

    def next_input(self, f_hat_BCHW: Tensor, scale: int) -> Tensor:
        """Return the transformer's input for `scale`, from f_hat: (B, l, C)."""
        return self.shrink(f_hat_BCHW, scale).flatten(2).transpose(1, 2)

    def shrink(self, f_BCHW: Tensor, scale: int) -> Tensor:
        """Return the map averaged over areas down to the side of a scale, (B, C, s, s)."""
        down_sH: Tensor = getattr(self, f"averaging_{scale}")
        return down_sH @ f_BCHW @ down_sH.T if scale + 1 < len(self.sides) else f_BCHW

    def nearest(self, z_BlC: Tensor) -> Tensor:
        """Return the token map of the codebook rows nearest to z by Euclidean distance, (B, l)."""
        rows_VC = self.embedding.weight
        # |z|² is the same for every row, so it does not change which is nearest.
        distance_BlV = ((-2 * z_BlC) @ rows_VC.T).add_(rows_VC.square().sum(1))
        return distance_BlV.argmin(-1)

    def quantize(self, f_BCHW: Tensor, scales: int | None = None) -> Quantized:
        """Return tokens and running sums of the first `scales` scales (all if None).

        Source: algorithm 1.
        """
        tokens: list[Tensor] = []
        f_hats: list[Tensor] = []
        residuals: list[Tensor] = []
        rest_BCHW = f_BCHW.detach()
        f_hat_BCHW = None
        for scale in range(len(self.sides) if scales is None else scales):
            z_BlC = self.shrink(rest_BCHW, scale).flatten(2).transpose(1, 2)
            idx_Bl = self.nearest(z_BlC)
            f_hat_BCHW = self.accumulate(f_hat_BCHW, self.embed(idx_Bl), scale)
            rest_BCHW = f_BCHW.detach() - f_hat_BCHW.detach()
            tokens.append(idx_Bl)
            f_hats.append(f_hat_BCHW)
            residuals.append(z_BlC)
        return Quantized(tokens, f_hats, residuals)

    def f_hats(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Return the running sum after each scale of given token maps.

        Source: algorithm 2.
        """
        found: list[Tensor] = []
        for scale, idx_Bl in enumerate(tokens):
            found.append(self.accumulate(found[-1] if found else None, self.embed(idx_Bl), scale))
        return found

    def teacher_input(self, tokens: Sequence[Tensor]) -> Tensor:
        """Return the transformer's input for scales 2 … K, (B, L - 1, C), from the true tokens.

        The last scales may be missing, and L is then smaller.
        """
        none_B0C = self.embedding(tokens[0][:, :0])
        f_hats = self.f_hats(tokens[:-1])
        return torch.cat([none_B0C, *(self.next_input(f_hat, k + 1) for k, f_hat in enumerate(f_hats))], dim=1)


def resizing(side: int, target: int, mode: str) -> Tensor:
    """Return the matrix (target, side) whose product with a row or column of a map resizes it.

    Differs: F.interpolate does the same, but on CUDA its bicubic gradient is summed in any order, so that
    no two training runs would be equal, and on Apple's GPUs it knows areas of whole pixels only.
    """
    unit_11ss = torch.eye(side)[None, None]
    return F.interpolate(unit_11ss, size=(target, side), mode=mode)[0, 0]


def quantization_loss(quantized: Quantized, f_BCHW: Tensor, commitment: float) -> Tensor:
    """Return the mean over scales of β·‖sg(f_hat_k) - f‖² + ‖f_hat_k - sg(f)‖², β being the commitment.

    Source: equation 5, its quantizer's part taken at every scale.
    """
    losses = [
        commitment * F.mse_loss(f_hat.detach(), f_BCHW) + F.mse_loss(f_hat, f_BCHW.detach())
        for f_hat in quantized.f_hats
    ]
    return torch.stack(losses).mean()


class Tokenizer(nn.Module):
    """Multi-scale residual VQVAE (paper, section 3.2)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.codebook_width, config.codebook_width, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.codebook_width, config.codebook_width, 3, padding=1)

    def features(self, image_B3PP: Tensor) -> Tensor:
        """Return the feature map f (B, C, H, W) of pixels in [-1, 1]."""
        return self.quant_conv(self.encoder(image_B3PP))

    def encode(self, image_B3PP: Tensor) -> list[Tensor]:
        """Return the token map of each scale, (B, l) int64, of pixels in [-1, 1]."""
        return self.quantize.quantize(self.features(image_B3PP)).tokens

    def decode_features(self, f_hat_BCHW: Tensor) -> Tensor:
        """Return pixels of a feature map, not clamped: training needs the gradient beyond [-1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat_BCHW))

    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """Return pixels in [-1, 1] of token maps, one per scale."""
        return self.decode_features(self.quantize.f_hats(tokens)[-1]).clamp(-1, 1)
