"""Floating-point operations per image, counted from the configurations. No torch here.

A product of matrices (a, b) and (b, c) is 2·a·b·c operations. They are counted for the models as they are defined, also
where a device or an approximation needs fewer. Small parts are left out: normalization, modulations (which depend on
the class alone), drawing tokens, the residual step.
"""

from collections.abc import Sequence

from varcli.config import TokenizerConfig, TransformerConfig


def transformer_operations(config: TransformerConfig, counts: Sequence[int], rows: int) -> list[int]:
    """Operations of the transformer in each step of one image.

    Args:
        config: of the transformer.
        counts: tokens of each step: s² of every scale, or 1 again and again in raster order.
        rows: of the transformer's batch, `SampleConfig.rows`; the head sees them mixed into one.
    """
    width = config.width
    so_far, found = 0, []
    for count in counts:
        embedding = 2 * count * config.codebook_width * width if so_far else 0  # the first token is the class
        so_far += count
        linear = 24 * count * width**2  # queries, keys, values, projection; four times the width and back
        attention = 4 * count * so_far * width
        head = 2 * count * width * config.codebook_size
        found.append(rows * (embedding + config.depth * (linear + attention)) + head)
    return found


def decoder_operations(config: TokenizerConfig) -> int:
    """Operations of the decoder for one image."""
    widths = [config.base_width * multiplier for multiplier in config.multipliers]
    before, positions = widths[-1], config.sides[-1] ** 2
    products = _convolution(config.codebook_width, config.codebook_width) * positions
    products += (_convolution(config.codebook_width, before) + 2 * _block(before, before)) * positions
    products += (1 + config.encoder_blocks + 1) * _attention(before, positions)
    for level in reversed(range(len(widths))):
        width = widths[level]
        products += (_block(before, width) + config.encoder_blocks * _block(width, width)) * positions
        if level > 0:
            positions *= 4
            products += _convolution(width, width) * positions
        before = width
    return 2 * (products + _convolution(before, 3) * positions)


def _convolution(width_in: int, width_out: int) -> int:
    """Return the products per position of a 3×3 convolution."""
    return 9 * width_in * width_out


def _block(width_in: int, width_out: int) -> int:
    """Return the products per position of a residual block."""
    shortcut = width_in * width_out if width_in != width_out else 0
    return _convolution(width_in, width_out) + _convolution(width_out, width_out) + shortcut


def _attention(width: int, positions: int) -> int:
    """Return the products of attention over all positions."""
    return 4 * width**2 * positions + 2 * width * positions**2
