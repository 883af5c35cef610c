"""A baseline: the same transformer in raster order, one token after the other, as such models drew before VAR.

What it is: the same blocks, head and decoder with the same weights in the same precision, over the s_K² tokens of
the finest map alone, left to right and top to bottom, with a cache of keys and values and guided by a second row.
So it costs what a raster-scan model of this size costs on this machine, and nothing else differs.

What it is not: a model. The weights were trained for scales, so its images show nothing. Nor is it the very
baseline of the paper's "20 times faster", which was another network, of another size, on another machine.

Shapes: B images, R rows of the transformer's batch (B, or 2B when guided: conditional above unconditional),
l tokens, D width, C codebook channels, V codebook rows.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from varcli.acceleration.cuda_graphs import Runner
from varcli.acceleration.devices import block_weight
from varcli.config import SampleConfig
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.sampler import EAGER
from varcli.sampling.scale_model import ScaleModel
from varcli.sampling.token_sampling import candidates, generators, sample_tokens, uniforms


class RasterModel:
    """The transformer at work on one batch, token by token."""

    def __init__(self, transformer: Transformer, row_B: Tensor, config: SampleConfig) -> None:
        self.transformer = transformer
        # The cache may leave out the last scale, which no other looks at; here each token looks at those before it.
        side = transformer.config.sides[-1]
        self.work = ScaleModel(transformer, row_B, config, sides=(1, side, side + 1))

    def logits(self, position: int, input_B1C: Tensor | None) -> Tensor:
        """Return the guided logits (B, 1, V) of a token, after those of all before it.

        Args:
            position: of the token.
            input_B1C: codebook rows of the token before it; None before the first.
        """
        self.work.cache.filled = position
        return self.head(self.work.normalized(self.work.through_blocks(self.inputs(position, input_B1C))))

    def inputs(self, first: int, input_BlC: Tensor | None) -> Tensor:
        """Return the residual stream (R, l, D) of tokens from position `first` on, given those before each.

        Before the first token of all there is none (None): the class stands there.
        """
        if input_BlC is None:
            x_RlD = self.work.class_RD.unsqueeze(1) + self.transformer.pos_start
        else:
            x_RlD = self.transformer.word_embed(input_BlC).repeat(len(self.work.class_RD) // self.work.count, 1, 1)
        return x_RlD + self.transformer.pos_1LC[:, first : first + x_RlD.shape[1]]

    def head(self, h_RlD: Tensor) -> Tensor:
        """Return the guided logits (B, l, V) of what the blocks give; the strength is the same everywhere."""
        last_scale = len(self.transformer.config.sides) - 1
        logits_BlV: Tensor = self.transformer.head(self.work.guide(h_RlD, last_scale))
        return logits_BlV


@torch.inference_mode()
def scan(
    tokenizer: Tokenizer,
    transformer: Transformer,
    rows: Sequence[int],
    seeds: Sequence[int],
    config: SampleConfig,
    *,
    mark: Callable[[str], None] = lambda phase: None,
    runner: Runner = EAGER,
) -> Tensor:
    """Return the feature maps (B, C, H, W) of a batch of images drawn in raster order.

    Args:
        tokenizer: as for `sampler.generate`.
        transformer: the same.
        rows: row of the class table an image.
        seeds: one seed an image.
        config: guidance and filters.
        mark: called with "transformer" and "drawing" after these phases of each token.
        runner: how to run the steps.
    """
    device, length = block_weight(transformer).device, transformer.config.sides[-1] ** 2
    row_B = runner.admit("rows", torch.tensor(rows), device)
    u_Bl = runner.admit("numbers", uniforms(generators(seeds, rows), length), device)
    model = runner.run("class", lambda: RasterModel(transformer, row_B, config))
    drawn: list[Tensor] = []
    input_B1C = None
    for position in range(length):
        logits_B1V = runner.run(f"transformer {position}", partial(model.logits, position, input_B1C))
        mark("transformer")
        u_B1 = u_Bl[:, position : position + 1]
        idx_B1, input_B1C = runner.run(f"drawing {position}", partial(_draw, tokenizer, config, logits_B1V, u_B1))
        drawn.append(idx_B1)
        mark("drawing")
    return tokenizer.quantize.embed(torch.cat(drawn, dim=1))


def _draw(tokenizer: Tokenizer, config: SampleConfig, logits_B1V: Tensor, u_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token and its codebook row, (B, 1) and (B, 1, C)."""
    idx_B1 = sample_tokens(candidates(logits_B1V, config.top_k, config.top_p), u_B1)
    return idx_B1, tokenizer.quantize.embedding(idx_B1)
