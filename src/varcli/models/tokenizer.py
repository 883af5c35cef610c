"""The tokenizer: pictures to token maps and back.

Shapes: B pictures, C codebook channels, H = W = s_K, P = H · downsampling pixels a side,
l tokens of one scale.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from varcli.config import TokenizerConfig
from varcli.models.autoencoder import Decoder, Encoder
from varcli.models.quantizer import Quantizer


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
        """Return pixels in [-1, 1] of token maps, one a scale."""
        return self.decode_features(self.quantize.f_hats(tokens)[-1]).clamp(-1, 1)
