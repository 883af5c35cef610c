"""The naive sampler: one image, no cache, nothing clever. It is the specification.

`sampling/sampler` must sample the same tokens, which the tests check; `var bench --vs naive` measures how much faster
it is.

Shapes: l tokens of one scale, D width, C codebook channels, V codebook rows, K candidates of a draw, s the side
of a scale.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from varcli.config import SampleConfig, sequence_length
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.guidance import damaged, prior


@torch.no_grad()
def sample(
    tokenizer: Tokenizer,
    transformer: Transformer,
    label: int,
    seed: int,
    config: SampleConfig,
    *,
    refiner: Transformer | None = None,
    mark: Callable[[str], None] = lambda phase: None,
) -> tuple[list[Tensor], Tensor]:
    """Return one image's token maps, each (l,), and its pixels (P, P, 3) as uint8.

    `refiner` and `mark` are as for the sampler.
    """
    quantizer, sides = tokenizer.quantize, transformer.config.sides
    source = torch.Generator().manual_seed(image_seed(seed, label))
    tokens: list[Tensor] = []
    f_hats: list[Tensor] = []
    before_lV: Tensor | None = None
    for scale, side in enumerate(sides):
        ratio = scale / max(len(sides) - 1, 1)
        if refiner is not None and scale + 1 == config.refine_from:
            transformer = refiner
        logits_lV = conditional_lV = scale_logits(tokenizer, transformer, label, f_hats)
        if config.cfg > 0:
            unconditional_lV = scale_logits(tokenizer, transformer, transformer.config.null_class, f_hats)
            t = config.cfg * ratio if scale in config.guided_scales else 0
            logits_lV = (1 + t) * logits_lV - t * unconditional_lV
        if config.vpg > 0:
            damaged_lV = scale_logits(tokenizer, transformer, label, f_hats, seen=damaged)
            logits_lV = logits_lV + config.vpg * (conditional_lV - damaged_lV)
        own_lV = logits_lV
        if config.ssg > 0 and before_lV is not None:
            logits_lV = own_lV + config.ssg * (own_lV - prior(before_lV[None], side)[0])
        before_lV = own_lV
        logits_lV = logits_lV / config.temperature
        mark("transformer")
        if config.smooth:
            weight_lV = smooth_weights(logits_lV, config, ratio, source)
            h_1lC = (weight_lV @ quantizer.embedding.weight).unsqueeze(0)
            h_1Css = h_1lC.transpose(1, 2).reshape(1, -1, side, side)
            tokens.append(weight_lV.argmax(-1))
        else:
            u_l = torch.rand(side * side, generator=source).to(logits_lV)
            tokens.append(draw(logits_lV, u_l, config))
            h_1Css = quantizer.embed(tokens[-1].unsqueeze(0))
        f_hats.append(quantizer.accumulate(f_hats[-1] if f_hats else None, h_1Css, scale))
        mark("token sampling")
    image = tokenizer.decode_features(f_hats[-1]).clamp(-1, 1)[0]
    return tokens, ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)


def image_seed(seed: int, label: int) -> int:
    """Seed of the image's own generator."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {label}".encode(), digest_size=4).digest(), "little")


def scale_logits(
    tokenizer: Tokenizer,
    transformer: Transformer,
    label: int,
    f_hats: list[Tensor],
    *,
    seen: Callable[[Tensor], Tensor] = lambda input_1lC: input_1lC,
) -> Tensor:
    """Return the logits (l, V) of the scale after those given, computed from the whole sequence so far.

    `seen` maps each scale's input to what the transformer sees of it.
    """
    scale, sides = len(f_hats), transformer.config.sides
    class_1D = transformer.class_emb(torch.tensor([label], device=transformer.pos_start.device))
    inputs = [None, *(seen(tokenizer.quantize.next_input(f_hat, k + 1)) for k, f_hat in enumerate(f_hats))]
    x_1LD = torch.cat([transformer.scale_input(k, class_1D, input_1lC) for k, input_1lC in enumerate(inputs)], dim=1)
    length = sequence_length(sides[: scale + 1])
    bias = transformer.attn_bias_for_masking[:, :, :length, :length]
    for i, (block, ada) in enumerate(zip(transformer.blocks, transformer.modulations(class_1D), strict=True)):
        x_1LD = block(x_1LD, ada, i, bias, None)
    logits_1LV = transformer.head(transformer.head_nm(x_1LD, class_1D))
    return logits_1LV[0, -(sides[scale] ** 2) :]


def filtered(logits_lV: Tensor, config: SampleConfig) -> Tensor:
    """Return logits with -inf wherever top-k, then top-p, drops a token."""
    if config.top_k > 0:
        worst_l1 = logits_lV.topk(min(config.top_k, logits_lV.shape[1])).values[:, -1:]
        logits_lV = logits_lV.masked_fill(logits_lV < worst_l1, -math.inf)
    if config.top_p > 0:
        rising_lV, order_lV = logits_lV.sort(dim=1)
        dropped_lV = rising_lV.softmax(1).cumsum(1) <= 1 - config.top_p
        dropped_lV[:, -1] = False
        logits_lV = logits_lV.masked_fill(dropped_lV.scatter(1, order_lV, dropped_lV), -math.inf)
    return logits_lV


def draw(logits_lV: Tensor, u_l: Tensor, config: SampleConfig) -> Tensor:
    """Return tokens (l,): the first whose cumulative probability, from the best down, exceeds u."""
    probability_lV, order_lV = filtered(logits_lV, config).softmax(1).sort(dim=1, descending=True)
    total_lV = probability_lV.cumsum(1)
    rank_l1 = (total_lV <= u_l[:, None] * total_lV[:, -1:]).sum(1, keepdim=True)
    last_l1 = (probability_lV > 0).sum(1, keepdim=True) - 1
    return order_lV.gather(1, rank_l1.minimum(last_l1)).squeeze(1)


def smooth_weights(logits_lV: Tensor, config: SampleConfig, ratio: float, source: torch.Generator) -> Tensor:
    """Return Gumbel-softmax weights of the codebook rows, (l, V); the best token gets the first noise."""
    sorted_lV, order_lV = filtered(logits_lV, config).sort(dim=1, descending=True)
    count = min(config.top_k, logits_lV.shape[1]) or logits_lV.shape[1]
    noise_lK = -torch.empty(len(logits_lV), count).exponential_(generator=source).log().to(logits_lV)
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    weight_lK = ((sorted_lV[:, :count] * (1 + ratio) + noise_lK) / temperature).softmax(1)
    return torch.zeros_like(logits_lV).scatter(1, order_lV[:, :count], weight_lK)
