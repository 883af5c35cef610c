"""Models with random weights in a checkpoint's shape: they cost as much as trained ones, and need no download."""

import torch

from varcli.checkpoints.registry import local_checkpoint, registry
from varcli.checkpoints.store import load_model, without_initialization
from varcli.config import GRID_256, GRID_512, TokenizerConfig, TransformerConfig
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer

Models = tuple[Tokenizer, Transformer]

SHARED_DEPTH = 36
"""Depth of the released model that shares one modulation among all blocks."""
DEVIATION = 0.02
"""Of the random weights; small enough that nothing overflows in 16 bits."""


def random_models(checkpoint: str) -> Models:
    """Return both models of a checkpoint in evaluation mode, with the same random weights every time.

    Raises:
        CheckpointError: no checkpoint has this name, or the file cannot be read.
    """
    return randomized(*shapes(checkpoint))


def randomized(tokenizer_config: TokenizerConfig, transformer_config: TransformerConfig) -> Models:
    """Return both models of any shape in evaluation mode, with the same random weights every time."""
    with without_initialization():
        tokenizer, transformer = Tokenizer(tokenizer_config), Transformer(transformer_config)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*tokenizer.parameters(), *transformer.parameters()]:
            parameter.normal_(0, DEVIATION, generator=source)
    return tokenizer.eval(), transformer.eval()


def shapes(checkpoint: str) -> tuple[TokenizerConfig, TransformerConfig]:
    """Return the configurations of a checkpoint, of a released one whether it was downloaded or not.

    Raises:
        CheckpointError: no checkpoint has this name, or the file cannot be read.
    """
    entry = registry().get(checkpoint)
    if entry and entry.depth:
        sides = GRID_256 if entry.pixels == 256 else GRID_512
        return TokenizerConfig(sides=sides), released_transformer(entry.depth, sides)
    model = load_model(local_checkpoint(checkpoint))
    return model.tokenizer.config, model.transformer.config


def released_transformer(depth: int, sides: tuple[int, ...]) -> TransformerConfig:
    """Return the shape of a released transformer: all of it follows from its depth (paper, section 3.1)."""
    tokenizer = TokenizerConfig(sides=sides)
    return TransformerConfig(
        depth=depth,
        width=64 * depth,
        sides=sides,
        codebook_size=tokenizer.codebook_size,
        codebook_width=tokenizer.codebook_width,
        shared_adaln=depth == SHARED_DEPTH,
    )
