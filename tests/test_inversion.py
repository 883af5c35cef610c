"""Editing without a mask: the image's noise is exact, and the strength goes from the image to a new sample."""

import math

import numpy as np
import pytest
import torch

from support import reference
from varcli.acceleration.dispatch import prepare
from varcli.config import SampleConfig
from varcli.sampling.inversion import gumbels_given, invert, repaint
from varcli.sampling.reconstruction import encode
from varcli.sampling.sampler import Noise, generate
from varcli.sampling.token_sampling import generators

CONFIG = SampleConfig(cfg=2.0, top_k=20, top_p=0.9, temperature=0.8)
NOISE = np.random.RandomState(0).randint(0, 256, (1, 64, 64, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def mini():
    found = reference.load("mini")
    prepare(found.tokenizer, found.transformer, torch.device("cpu"), "fp32")
    return found.tokenizer, found.transformer


def equal(tokens, others):
    return [torch.equal(idx_Bl, other_Bl) for idx_Bl, other_Bl in zip(tokens, others, strict=True)]


def test_noise_given_tokens_of_the_model_is_standard_gumbel_noise():
    """Of tokens that are drawn from the logits, all moments are those of independent noise."""
    torch.manual_seed(0)
    logits_14 = torch.tensor([[2.0, 0.0, -1.0, 1.0]])
    count = 40_000
    idx_1l = torch.multinomial(logits_14[0].softmax(0), count, replacement=True)[None]
    noise_l4 = gumbels_given(logits_14.expand(1, count, 4), idx_1l, generators([0], [0]))[0]
    assert torch.equal((logits_14 + noise_l4).argmax(-1), idx_1l[0])
    error = 5 / math.sqrt(count)
    assert (noise_l4.mean(0) - 0.5772).abs().max() < error * 1.3
    assert (noise_l4.var(0) - math.pi**2 / 6).abs().max() < error * 4
    correlation_44 = torch.corrcoef(noise_l4.T)
    assert (correlation_44 - torch.eye(4)).abs().max() < error
    assert (noise_l4 < 0).double().mean(0) == pytest.approx(math.exp(-1), abs=error)


def test_the_same_class_draws_the_image_again_with_its_noise(mini):
    """However unlikely its tokens are: here they are those of random pixels."""
    tokenizer, transformer = mini
    tokens = encode(tokenizer, NOISE)
    noise = invert(tokenizer, transformer, tokens, 3, generators([7], [0]), CONFIG)
    everywhere = Noise(noise, [torch.ones_like(idx_1l, dtype=torch.bool) for idx_1l in tokens])
    again = [r.tokens for r in generate(tokenizer, transformer, [3], [0], CONFIG, noise=everywhere)]
    assert all(equal(again, tokens))
    other = [r.tokens for r in generate(tokenizer, transformer, [4], [0], CONFIG, noise=everywhere)]
    assert not all(equal(other, tokens))


def test_strength_goes_from_the_image_to_the_sample(mini):
    tokenizer, transformer = mini
    tokens = encode(tokenizer, NOISE)

    def repainted(strength, from_label=10):
        return [r.tokens for r in repaint(tokenizer, transformer, tokens, 3, from_label, 5, strength, CONFIG)]

    sample = [r.tokens for r in generate(tokenizer, transformer, [3], [5], CONFIG)]
    assert all(equal(repainted(0.0), tokens))
    assert all(equal(repainted(1.0), sample))
    assert equal(repainted(0.5), tokens)[:2] == [True, True] and not all(equal(repainted(0.5), tokens))
    changed = [float((torch.cat(repainted(s, 3), 1) != torch.cat(tokens, 1)).float().mean()) for s in (0.3, 0.6, 0.9)]
    assert changed[0] < changed[1] < changed[2]
