"""The next-scale loop, once: class and seed to token maps, and feature maps to pixels.

Shapes: B images, s the side and l = s² the tokens of one scale, L tokens of all scales, C codebook
channels, V codebook rows, K candidates of a draw, H = W = s_K, P pixels per side.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from varcli.acceleration.cuda_graphs import EagerRunner, Runner
from varcli.acceleration.devices import block_weight
from varcli.config import SampleConfig, progress_ratio, spans
from varcli.models.tokenizer import Quantizer, Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.approximations import ApproximateScaleModel
from varcli.sampling.scale_model import ScaleModel
from varcli.sampling.token_sampling import (
    Candidates,
    candidates,
    generators,
    gumbel_softmax,
    gumbels,
    sample_tokens,
    uniforms,
)

EAGER = EagerRunner()

Pixels = npt.NDArray[np.uint8]
"""uint8, (B, P, P, 3)."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Tokens of a given image that are kept while the rest is sampled."""

    tokens: list[Tensor]
    """The given image's token maps, (B, l) or (1, l)."""
    masks: list[Tensor]
    """True where its token stays, (B, l) or (1, l)."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Gumbel noise that draws tokens, instead of the seed's numbers and without filters; see `sampling/inversion`."""

    values: list[Tensor]
    """(B, l, V) float64 of each scale, on the CPU."""
    masks: list[Tensor]
    """True where a token is drawn with it, (B, l)."""


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """Result of one scale."""

    scale: int
    """Which scale, from 0."""
    tokens: Tensor
    """Its token map, (B, l) int64; in a smooth run the tokens of greatest weight."""
    f_hat: Tensor
    """The feature map so far, (B, C, H, W)."""
    logits: Tensor
    """The guided logits, (B, l, V)."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a batch gets from logits to tokens, and from tokens to the input of the next scale."""

    quantizer: Quantizer
    config: SampleConfig
    keep: Keep | None
    noise: Noise | None
    sources: list[torch.Generator]
    """Each image's own."""
    u_BL: Tensor | None
    """Their random numbers in [0, 1), one per token; None in a smooth run, which draws from the sources itself."""

    def step(self, scale: int, logits_BlV: Tensor, f_hat_BCHW: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a scale's tokens (B, l), f_hat with them, and, if there is a next scale, its input (B, l, C)."""
        found = candidates(logits_BlV, self.config.top_k, self.config.top_p, self.config.temperature)
        idx_Bl, h_BCss = self._mixed(found, scale) if self.u_BL is None else self._drawn(found, scale, self.u_BL)
        if self.noise is not None:
            noisy_BlV = (logits_BlV / self.config.temperature).cpu().double() + self.noise.values[scale]
            idx_Bl = torch.where(self.noise.masks[scale], noisy_BlV.argmax(-1).to(idx_Bl.device), idx_Bl)
            h_BCss = self.quantizer.embed(idx_Bl)
        if self.keep is not None:
            idx_Bl, h_BCss = self._kept(idx_Bl, h_BCss, self.keep, scale)
        f_hat_BCHW = self.quantizer.accumulate(f_hat_BCHW, h_BCss, scale)
        more = scale + 1 < len(self.quantizer.sides)
        return idx_Bl, f_hat_BCHW, self.quantizer.next_input(f_hat_BCHW, scale + 1) if more else None

    def _drawn(self, found: Candidates, scale: int, u_BL: Tensor) -> tuple[Tensor, Tensor]:
        idx_Bl = sample_tokens(found, u_BL[:, spans(self.quantizer.sides)[scale]])
        return idx_Bl, self.quantizer.embed(idx_Bl)

    def _mixed(self, found: Candidates, scale: int) -> tuple[Tensor, Tensor]:
        _, length, count = found.order.shape
        ratio = progress_ratio(scale, len(self.quantizer.sides))
        weight_BlK = gumbel_softmax(found, gumbels(self.sources, length, count), ratio)
        rows_VC = self.quantizer.embedding.weight
        weight_BlV = weight_BlK.new_zeros(*weight_BlK.shape[:2], len(rows_VC)).scatter_(-1, found.order, weight_BlK)
        side = self.quantizer.sides[scale]
        idx_Bl = weight_BlV.argmax(-1)
        return idx_Bl, (weight_BlV @ rows_VC).transpose(1, 2).reshape(len(idx_Bl), -1, side, side)

    def _kept(self, idx_Bl: Tensor, h_BCss: Tensor, keep: Keep, scale: int) -> tuple[Tensor, Tensor]:
        given_Bl, mask_Bl = keep.tokens[scale].expand_as(idx_Bl), keep.masks[scale].expand_as(idx_Bl)
        mask_B1ss = mask_Bl.view(len(idx_Bl), 1, *h_BCss.shape[2:])
        given_BCss = self.quantizer.embed(given_Bl)
        return torch.where(mask_Bl, given_Bl, idx_Bl), torch.where(mask_B1ss, given_BCss, h_BCss)


@torch.inference_mode()
def generate(
    tokenizer: Tokenizer,
    transformer: Transformer,
    labels: Sequence[int],
    seeds: Sequence[int],
    config: SampleConfig,
    *,
    refiner: Transformer | None = None,
    keep: Keep | None = None,
    noise: Noise | None = None,
    mark: Callable[[str], None] = lambda phase: None,
    runner: Runner = EAGER,
) -> Iterator[ScaleResult]:
    """Yield each scale of a batch of images as soon as it is drawn, coarse to fine.

    Args:
        tokenizer: in evaluation mode, on the transformer's device.
        transformer: in evaluation mode; its blocks compute in the precision of their weights.
        labels: index of each image's class in the class table, `config.null_class` for none.
        seeds: one seed per image; with its label and the settings it determines the image.
        config: guidance, filters and how to sample tokens.
        refiner: draws the scales from `config.refine_from` on, made ready as the transformer was.
        keep: tokens of a given image that stay, for editing.
        noise: draws tokens in its masks; not in a smooth run, which draws none.
        mark: called with "transformer" and "token sampling" after these phases of each scale, for a stopwatch.
        runner: how to run the steps. Captured ones leave their results where those of the next batch will be.

    Source: paper, figure 4 and equation 4; guidance as in its section 4; the refiner is CoDe's, arXiv 2411.17787.
    """
    device, sources = block_weight(transformer).device, generators(seeds, labels)
    label_B = runner.copy_in("labels", torch.tensor(labels), device)
    numbers_BL = None if config.smooth else uniforms(sources, transformer.config.length)
    u_BL = None if numbers_BL is None else runner.copy_in("numbers", numbers_BL, device)
    kind = ApproximateScaleModel if config.approximations else ScaleModel
    model = runner.run("class", lambda: kind(transformer, label_B, config))
    drawing = Drawing(tokenizer.quantize, config, keep, noise, sources, u_BL)
    f_hat_BCHW = None
    inputs: list[Tensor | None] = [None]
    for scale in range(len(transformer.config.sides)):
        if refiner is not None and scale + 1 == config.refine_from:
            coarse, model = model, runner.run("refiner class", lambda: kind(refiner, label_B, config))
            runner.run("refiner prefix", partial(model.take_over, coarse, inputs[:-1]))
        logits_BlV = runner.run(f"transformer {scale}", partial(model.logits, scale, inputs[scale]))
        mark("transformer")
        drawn = runner.run(f"token sampling {scale}", partial(drawing.step, scale, logits_BlV, f_hat_BCHW))
        mark("token sampling")
        idx_Bl, f_hat_BCHW, input_BlC = drawn
        inputs.append(input_BlC)
        yield ScaleResult(scale, idx_Bl, f_hat_BCHW, logits_BlV)


@torch.inference_mode()
def decode(tokenizer: Tokenizer, f_hat_BCHW: Tensor) -> Pixels:
    """Return the pixels of feature maps as uint8, computed in the precision of the decoder's weights."""
    pixels: Pixels = decode_on_device(tokenizer, f_hat_BCHW).cpu().numpy()
    return pixels


DECODED_AT_ONCE = 16
"""Images; more of them take gigabytes in the decoder's last layers and are not faster."""


@torch.inference_mode()
def decode_on_device(tokenizer: Tokenizer, f_hat_BCHW: Tensor) -> Tensor:
    """Return the same (B, P, P, 3) on the models' device, without waiting for it."""
    f_hat_BCHW = f_hat_BCHW.to(tokenizer.post_quant_conv.weight.dtype, memory_format=torch.channels_last)
    parts = [tokenizer.decode_features(part).float() for part in f_hat_BCHW.split(DECODED_AT_ONCE)]
    return torch.cat([in_8_bits(part.clamp(-1, 1)) for part in parts])


def in_8_bits(image_B3PP: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8, (B, P, P, 3)."""
    return ((image_B3PP + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pixels(image_B3PP: Tensor) -> Pixels:
    """Return images in [-1, 1] as uint8 on the host."""
    pixels: Pixels = in_8_bits(image_B3PP).cpu().numpy()
    return pixels
