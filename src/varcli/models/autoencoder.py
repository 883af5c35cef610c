"""Encoder and decoder of the tokenizer, the convolutional pair of VQGAN (Esser et al. 2021).

Shapes: B images, 3 or C channels, H and W rows and columns, N = H·W positions.
Module names are those inside the released checkpoint files, hence `down.0.block.1`.
"""

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.config import TokenizerConfig


class Norm(nn.GroupNorm):
    """The normalization used everywhere in the tokenizer, in 32 groups."""

    def __init__(self, width: int) -> None:
        super().__init__(32, width, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return a map of the same shape."""
        # In float32 where a gradient is needed, as in CUDA's autocast: on a CPU its gradient in bf16 is far slower.
        x_BCHW = x_BCHW.float() if torch.is_grad_enabled() else x_BCHW
        # Not F.group_norm, which refuses a single value per group.
        return torch.group_norm(x_BCHW, self.num_groups, self.weight, self.bias, self.eps)


class NormSilu(Norm):
    """The normalization, and SiLU: x·sigmoid(x)."""

    kernel: Callable[[nn.GroupNorm, Tensor], Tensor] | None
    """Fused kernel that does both, for maps in `channels_last`, where the device has one and no gradient is needed."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.kernel = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return a map of the same shape."""
        learning = torch.is_grad_enabled()
        if self.kernel is not None and not learning and x_BCHW.is_contiguous(memory_format=torch.channels_last):
            return self.kernel(self, x_BCHW)
        # In place where no gradient needs the input, which saves memory traffic.
        return F.silu(super().forward(x_BCHW), inplace=not learning)


class ResidualBlock(nn.Module):
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))), with a 1×1 shortcut where the width changes."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = NormSilu(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = NormSilu(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the block's output, as many channels as its second convolution has."""
        h_BCHW = self.conv1(self.norm1(x_BCHW))
        h_BCHW = self.conv2(self.norm2(h_BCHW))
        if hasattr(self, "nin_shortcut"):
            x_BCHW = self.nin_shortcut(x_BCHW)
        return x_BCHW + h_BCHW if torch.is_grad_enabled() else h_BCHW.add_(x_BCHW)


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return x plus what each position gathered from all others."""
        qkv_BCN = self.qkv(self.norm(x_BCHW)).flatten(2)
        q_BNC, k_BNC, v_BNC = qkv_BCN.transpose(1, 2).chunk(3, dim=-1)
        h_BNC = self.attend(q_BNC.unsqueeze(1), k_BNC.unsqueeze(1), v_BNC.unsqueeze(1)).squeeze(1)
        return x_BCHW + self.proj_out(h_BNC.transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Halve the resolution: one row and column of zeros at the end, then a 3×3 convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map at half the rows and columns."""
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a 3×3 convolution."""

    kernels: list[tuple[int, int, Tensor]]
    """For each row and column within a pixel the 2×2 kernel that gives it, once `split` was called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.kernels = []

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map at twice the rows and columns."""
        if not self.kernels:
            return self.conv(repeat_pixels(x_BCHW))
        (batch, channels, height, width), layout = x_BCHW.shape, torch.channels_last
        wide_BCHW = torch.empty((batch, channels, 2 * height, 2 * width), dtype=x_BCHW.dtype, memory_format=layout)
        for row, column, kernel_OI22 in self.kernels:
            h_BCHW = F.conv2d(x_BCHW, kernel_OI22, self.conv.bias, padding=1)
            wide_BCHW[:, :, row::2, column::2] = h_BCHW[:, :, row : row + height, column : column + width]
        return wide_BCHW

    @torch.no_grad()
    def split(self) -> None:
        """Switch to four 2×2 convolutions, one per position within a pixel: the same with 4/9 of the work.

        Of the three rows under the kernel two come from the same row of x, so their weights are added; columns alike.
        For frozen weights on a CPU: on a GPU four convolutions are slower.
        """
        weight_OIHW = self.conv.weight
        self.kernels = [
            (row, column, pair_sums(pair_sums(weight_OIHW.float(), 2, row), 3, column).to(weight_OIHW.dtype))
            for row, column in product((0, 1), repeat=2)
        ]
        layout = torch.channels_last
        self.kernels = [(row, column, kernel.contiguous(memory_format=layout)) for row, column, kernel in self.kernels]


def repeat_pixels(x_BCHW: Tensor) -> Tensor:
    """Return the map with each position repeated twice in both directions: nearest-neighbour interpolation."""
    if not torch.is_grad_enabled():
        return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
    # The gradient of an interpolation is added up position by position once compiled; that of a view is a sum.
    batch, channels, height, width = x_BCHW.shape
    x_BH1W1C = x_BCHW.permute(0, 2, 3, 1)[:, :, None, :, None]
    x_BH2W2C = x_BH1W1C.expand(batch, height, 2, width, 2, channels)
    return x_BH2W2C.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def pair_sums(weight_OIHW: Tensor, dim: int, phase: int) -> Tensor:
    """Return the weights with, of three along a dimension, the last two added up (phase 0) or the first two (1)."""
    first, middle, last = weight_OIHW.split(1, dim)
    return torch.cat([first, middle + last] if phase == 0 else [first + middle, last], dim)


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
    """Features to pixels, the encoder's mirror with one more block per level."""

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
