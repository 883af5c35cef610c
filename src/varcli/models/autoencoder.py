"""Encoder and decoder of the tokenizer, the convolutional pair of VQGAN.

Shapes: B pictures, 3 or C channels, H and W rows and columns.
Module names are those inside the released checkpoint files, hence `down.0.block.1`.
"""

from torch import Tensor, nn

from varcli.config import TokenizerConfig
from varcli.models.layers import Downsample, NormSilu, ResidualBlock, SpatialAttention, Upsample


class Level(nn.Module):
    """Residual blocks at one resolution; at the lowest an attention follows each block."""

    def __init__(self, width_in: int, width: int, blocks: int, attention: bool) -> None:
        super().__init__()
        widths = [width_in] + [width] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(w, width) for w in widths)
        self.attn = nn.ModuleList(SpatialAttention(width) for _ in widths if attention)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the level's output at the resolution of its input."""
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[i](x_BCHW)
        return x_BCHW


class DownLevel(Level):
    """A level of the encoder; all but the lowest end with half the resolution."""

    def __init__(self, width_in: int, width: int, blocks: int, lowest: bool) -> None:
        super().__init__(width_in, width, blocks, attention=lowest)
        self.downsample = None if lowest else Downsample(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the next level's input."""
        x_BCHW = super().forward(x_BCHW)
        return x_BCHW if self.downsample is None else self.downsample(x_BCHW)


class UpLevel(Level):
    """A level of the decoder; all but the highest end with twice the resolution."""

    def __init__(self, width_in: int, width: int, blocks: int, lowest: bool, highest: bool) -> None:
        super().__init__(width_in, width, blocks, attention=lowest)
        self.upsample = None if highest else Upsample(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the next level's input."""
        x_BCHW = super().forward(x_BCHW)
        return x_BCHW if self.upsample is None else self.upsample(x_BCHW)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.attn_1 = SpatialAttention(width)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return a map of the same shape."""
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Encoder(nn.Module):
    """Pixels in [-1, 1] to features, at 1/downsampling of the resolution."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_width * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.base_width, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(width_in, width, config.encoder_blocks, lowest=i == last)
            for i, (width_in, width) in enumerate(zip([config.base_width, *widths], widths, strict=False))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = NormSilu(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.codebook_width, 3, padding=1)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Return features (B, C, H/downsampling, W/downsampling)."""
        h_BCHW = self.conv_in(image_B3HW)
        for level in self.down:
            h_BCHW = level(h_BCHW)
        return self.conv_out(self.norm_out(self.mid(h_BCHW)))


class Decoder(nn.Module):
    """Features to pixels, the encoder's mirror with one more block a level."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_width * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.codebook_width, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            UpLevel(width_in, width, config.encoder_blocks + 1, lowest=i == last, highest=i == 0)
            for i, (width_in, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = NormSilu(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, f_BCHW: Tensor) -> Tensor:
        """Return pixels, nominally in [-1, 1] but not clamped."""
        h_BCHW = self.mid(self.conv_in(f_BCHW))
        for level in reversed(self.up):
            h_BCHW = level(h_BCHW)
        return self.conv_out(self.norm_out(h_BCHW))
