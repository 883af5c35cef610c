"""The next-scale loop, once: class and seed to token maps, and feature maps to pixels.

Shapes: B pictures, R rows of the transformer's batch (B, or 2B when guided: conditional above
unconditional), s the side and l = s² the tokens of one scale, D width, C codebook channels,
V codebook rows, K candidates of a draw, H = W = s_K, P pixels a side.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from varcli.config import SampleConfig
from varcli.models.attention import KeyValueCache
from varcli.models.quantizer import Quantizer
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer, normalize
from varcli.sampling.devices import block_weight
from varcli.sampling.draws import Candidates, candidates, draw, generators, gumbels, mixture, uniforms
from varcli.scales import progress_ratio

Pixels = npt.NDArray[np.uint8]
"""uint8, (B, P, P, 3)."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Tokens of a given picture that stay where they are while the rest is drawn."""

    tokens: list[Tensor]
    """The given picture's token maps, (B, l) or (1, l)."""
    masks: list[Tensor]
    """True where its token stays, (B, l) or (1, l)."""


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """What is known after one scale."""

    scale: int
    """Which scale, from 0."""
    tokens: Tensor
    """Its token map, (B, l) int64; in a smooth run the tokens of greatest weight."""
    f_hat: Tensor
    """The feature map so far, (B, C, H, W)."""


class ScaleModel:
    """The transformer at work on one batch: what it computes once, and what it remembers between scales."""

    def __init__(self, transformer: Transformer, rows: Sequence[int], config: SampleConfig) -> None:
        model, weight = transformer, block_weight(transformer)
        self.transformer, self.cfg, self.count = model, config.cfg, len(rows)
        unconditional = [model.config.null_class] * len(rows) if config.cfg > 0 else []
        self.class_RD = model.class_emb(torch.tensor([*rows, *unconditional], device=weight.device))
        self.low_precision = torch.autocast(
            weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32, cache_enabled=False
        )
        with self.low_precision:
            self.modulations = [ada.float() for ada in model.modulations(self.class_RD)]
        final_R12D = model.head_nm.ada_lin(self.class_RD)
        self.final_scale, self.final_shift = final_R12D.unbind(2)
        self.cache = KeyValueCache(model.config, len(self.class_RD), weight.device, weight.dtype)

    def logits(self, scale: int, input_BlC: Tensor | None) -> Tensor:
        """Return the guided logits (B, l, V) of the next scale, in float32."""
        if input_BlC is not None:
            input_BlC = input_BlC.repeat(len(self.class_RD) // self.count, 1, 1)
        x_RlD = self.transformer.scale_input(scale, self.class_RD, input_BlC)
        with self.low_precision:
            x_RlD = self.transformer.step(x_RlD, self.modulations, self.cache)
        h_BlD = self.guide(normalize(x_RlD, self.final_scale, self.final_shift), scale)
        logits_BlV: Tensor = self.transformer.head(h_BlD)
        return logits_BlV

    def guide(self, h_RlD: Tensor, scale: int) -> Tensor:
        """Return (1 + t)·conditional - t·unconditional, (B, l, D), with t = cfg·k/(K-1).

        Differs: mixed before the head instead of after it, the same because the head is linear.
        """
        t = self.cfg * progress_ratio(scale, len(self.transformer.config.sides))
        if t == 0:
            return h_RlD[: self.count]
        return (1 + t) * h_RlD[: self.count] - t * h_RlD[self.count :]


@torch.inference_mode()
def generate(
    tokenizer: Tokenizer,
    transformer: Transformer,
    rows: Sequence[int],
    seeds: Sequence[int],
    config: SampleConfig,
    *,
    keep: Keep | None = None,
    mark: Callable[[str], None] = lambda phase: None,
) -> Iterator[ScaleResult]:
    """Yield each scale of a batch of pictures as soon as it is drawn, coarse to fine.

    Args:
        tokenizer: in evaluation mode, on the transformer's device.
        transformer: in evaluation mode; its blocks compute in the precision of their weights.
        rows: row of the class table a picture, `config.null_class` for none.
        seeds: one seed a picture; with its row and the settings it determines the picture.
        config: guidance, filters and how to draw.
        keep: tokens of a given picture that stay, for editing.
        mark: called with "transformer" and "drawing" after these phases of each scale, for a stopwatch.

    Source: paper, figure 4 and equation 4; guidance as in its section 4.
    """
    model, sources = ScaleModel(transformer, rows, config), generators(seeds, rows)
    f_hat_BCHW, input_BlC = None, None
    for scale in range(len(transformer.config.sides)):
        logits_BlV = model.logits(scale, input_BlC)
        mark("transformer")
        found = candidates(logits_BlV, config.top_k, config.top_p)
        if config.smooth:
            idx_Bl, h_BCss = _mix_tokens(tokenizer.quantize, found, sources, scale)
        else:
            idx_Bl, h_BCss = _draw_tokens(tokenizer.quantize, found, sources)
        if keep is not None:
            idx_Bl, h_BCss = _keep_tokens(tokenizer.quantize, idx_Bl, h_BCss, keep, scale)
        f_hat_BCHW = tokenizer.quantize.accumulate(f_hat_BCHW, h_BCss, scale)
        mark("drawing")
        yield ScaleResult(scale, idx_Bl, f_hat_BCHW)
        if scale + 1 < len(transformer.config.sides):
            input_BlC = tokenizer.quantize.next_input(f_hat_BCHW, scale + 1)


def _draw_tokens(quantizer: Quantizer, found: Candidates, sources: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    idx_Bl = draw(found, uniforms(sources, found.order.shape[1]))
    return idx_Bl, quantizer.embed(idx_Bl)


def _mix_tokens(
    quantizer: Quantizer, found: Candidates, sources: Sequence[torch.Generator], scale: int
) -> tuple[Tensor, Tensor]:
    _, length, count = found.order.shape
    ratio = progress_ratio(scale, len(quantizer.sides))
    weight_BlK = mixture(found, gumbels(sources, length, count), ratio)
    rows_VC = quantizer.embedding.weight
    weight_BlV = weight_BlK.new_zeros(*weight_BlK.shape[:2], len(rows_VC)).scatter_(-1, found.order, weight_BlK)
    side = quantizer.sides[scale]
    idx_Bl = weight_BlV.argmax(-1)
    return idx_Bl, (weight_BlV @ rows_VC).transpose(1, 2).reshape(len(idx_Bl), -1, side, side)


def _keep_tokens(quantizer: Quantizer, idx_Bl: Tensor, h_BCss: Tensor, keep: Keep, scale: int) -> tuple[Tensor, Tensor]:
    given_Bl, mask_Bl = keep.tokens[scale].expand_as(idx_Bl), keep.masks[scale].expand_as(idx_Bl)
    mask_B1ss = mask_Bl.view(len(idx_Bl), 1, *h_BCss.shape[2:])
    return torch.where(mask_Bl, given_Bl, idx_Bl), torch.where(mask_B1ss, quantizer.embed(given_Bl), h_BCss)


@torch.inference_mode()
def decode(tokenizer: Tokenizer, f_hat_BCHW: Tensor) -> Pixels:
    """Return the pixels of feature maps as uint8, computed in the precision of the decoder's weights."""
    f_hat_BCHW = f_hat_BCHW.to(tokenizer.post_quant_conv.weight.dtype, memory_format=torch.channels_last)
    return to_pixels(tokenizer.decode_features(f_hat_BCHW).float().clamp(-1, 1))


def to_pixels(image_B3PP: Tensor) -> Pixels:
    """Return pictures in [-1, 1] as uint8."""
    pixels_BPP3 = ((image_B3PP + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    pixels: Pixels = pixels_BPP3.contiguous().cpu().numpy()
    return pixels
