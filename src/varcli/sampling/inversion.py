"""Editing without a mask: find the noise with which the model would sample an image's tokens, and sample again with it.

A token is sampled by adding Gumbel noise to the logits and taking the largest sum. The noise behind a given token is
not known, but its distribution is, so it can be sampled: the image's noise. With another class and the same noise most
tokens stay, and those on which the classes disagree change.

Shapes: B images, l tokens of one scale, V codebook rows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from varcli.config import SampleConfig
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.sampler import Keep, Noise, ScaleResult, generate
from varcli.sampling.token_sampling import generators, uniforms

_NO_LABEL = -1
"""Seeds the noise in place of a label, so that its numbers differ from those of a sample of this seed."""


def repaint(
    tokenizer: Tokenizer,
    transformer: Transformer,
    tokens: Sequence[Tensor],
    label: int,
    from_label: int,
    seed: int,
    strength: float,
    config: SampleConfig,
    refiner: Transformer | None = None,
) -> Iterator[ScaleResult]:
    """Yield each scale of an image, repainted as another class.

    The coarsest scales, a share of 1 - strength of them, stay as they are. In the others each token is sampled with the
    image's noise or, with a probability of `strength`, with noise of the seed. So 0 gives the image's own tokens, and
    1 the sample of this class and seed.

    Args:
        tokenizer: in evaluation mode, on the transformer's device.
        transformer: that `dispatch.prepare` made ready.
        tokens: token maps of one image, (1, l).
        label: index in the class table of the class to paint, `config.null_class` for none.
        from_label: index of the class that the image shows.
        seed: of the noise, the image's and the new.
        strength: between 0 and 1.
        config: settings of sampling. Filters do not apply where the image's noise is used: its tokens may be unlikely.
        refiner: as for `generate`.

    Source: VARIN (arXiv 2509.01984), with exact noise in place of its location-aware inversion; the coarse scales stay
        as in AREdit (arXiv 2503.23897).
    """
    kept = round((1 - strength) * len(tokens))
    masks = [torch.full_like(idx_1l, scale < kept, dtype=torch.bool) for scale, idx_1l in enumerate(tokens)]
    sources = generators([seed], [_NO_LABEL])
    inverted = [(uniforms(sources, idx_1l.shape[1]) >= strength).to(idx_1l.device) for idx_1l in tokens]
    noise = Noise(invert(tokenizer, transformer, tokens, from_label, sources, config, refiner), inverted)
    keep = Keep(list(tokens), masks)
    yield from generate(tokenizer, transformer, [label], [seed], config, refiner=refiner, keep=keep, noise=noise)


@torch.inference_mode()
def invert(
    tokenizer: Tokenizer,
    transformer: Transformer,
    tokens: Sequence[Tensor],
    label: int,
    sources: Sequence[torch.Generator],
    config: SampleConfig,
    refiner: Transformer | None = None,
) -> list[Tensor]:
    """Return noise with which a class and these settings give an image's tokens, (1, l, V) for each scale."""
    everything = Keep(list(tokens), [torch.ones_like(idx_1l, dtype=torch.bool) for idx_1l in tokens])
    results = generate(tokenizer, transformer, [label], [0], config, refiner=refiner, keep=everything)
    return [
        gumbels_given((result.logits / config.temperature).cpu(), result.tokens.cpu(), sources) for result in results
    ]


def gumbels_given(logits_BlV: Tensor, idx_Bl: Tensor, sources: Sequence[torch.Generator]) -> Tensor:
    """Draw standard Gumbel noise, (B, l, V) float64, for which the sum of logits and noise is largest at `idx_Bl`.

    The largest sum has a Gumbel distribution located at the logarithm of the summed exponentials, whichever token has
    it; the others have Gumbel distributions truncated there. All tensors are on the CPU, since not every device has
    float64.

    Source: Maddison, Tarlow and Minka 2014 (arXiv 1411.0030), top-down sampling.
    """
    logits_BlV = logits_BlV.double()
    exponentials = [torch.empty(logits_BlV.shape[1:]).double().exponential_(generator=source) for source in sources]
    exponential_BlV = torch.stack(exponentials)
    chosen_Bl1 = idx_Bl[:, :, None]
    largest_Bl1 = logits_BlV.logsumexp(-1, keepdim=True) - exponential_BlV.gather(-1, chosen_Bl1).log()
    noise_BlV = -((logits_BlV - largest_Bl1).exp() + exponential_BlV).log()
    return noise_BlV.scatter(-1, chosen_Bl1, largest_Bl1 - logits_BlV.gather(-1, chosen_Bl1))
