"""Approximations: what they leave alone, what they compute, and that nothing happens without them."""

from itertools import chain, combinations

import pytest
import torch

from support import reference
from support.fake_cuda import Watch, pretended
from test_cuda_graphs import Phases, never, released, taped
from varcli.acceleration import dispatch
from varcli.acceleration.cuda_graphs import GraphRunner
from varcli.config import APPROXIMATIONS, SampleConfig, TokenizerConfig, TransformerConfig
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling import approximations, sampler
from varcli.sampling.approximations import ApproximateScaleModel, pivotal, resized_map
from varcli.sampling.sampler import generate
from varcli.sampling.scale_model import ScaleModel

SIDES = (1, 2, 5, 6, 8)
LATE = (3, 4)
SOME = [",".join(names) for names in chain.from_iterable(combinations(APPROXIMATIONS, n) for n in (1, 2, 3))]


@pytest.fixture(scope="module")
def small():
    shape = {"sides": SIDES, "codebook_size": 96, "codebook_width": 8}
    tokenizer = Tokenizer(TokenizerConfig(base_width=32, multipliers=(1, 1, 2), **shape))
    transformer = Transformer(TransformerConfig(depth=3, width=128, class_count=5, **shape))
    reference.set_rule_weights(tokenizer)
    reference.set_rule_weights(transformer)
    return tokenizer.eval(), transformer.eval()


@pytest.fixture(scope="module")
def inputs(small):
    """What the transformer sees of two images, scale by scale."""
    tokenizer, _ = small
    source = torch.Generator().manual_seed(0)
    tokens = [torch.randint(96, (2, side * side), generator=source) for side in SIDES]
    with torch.no_grad():
        return [None, *tokenizer.quantize.teacher_input(tokens).split([side * side for side in SIDES[1:]], dim=1)]


@torch.inference_mode()
def logits(model, inputs):
    return [model.logits(scale, given) for scale, given in enumerate(inputs)]


def tokens_of(models, config, labels=(0, 3), seeds=(5, 6), **options):
    return [result.tokens.clone() for result in generate(*models, list(labels), list(seeds), config, **options)]


def test_nothing_is_approximated_unless_asked_for(small, monkeypatch):
    monkeypatch.setattr(sampler, "ApproximateScaleModel", None)
    assert len(tokens_of(small, SampleConfig())) == len(SIDES)


@pytest.mark.parametrize("approximate", SOME)
def test_only_what_comes_late_changes(small, inputs, approximate):
    _, transformer = small
    exact = logits(ScaleModel(transformer, [0, 3], SampleConfig()), inputs)
    near = logits(ApproximateScaleModel(transformer, [0, 3], SampleConfig(approximate=approximate)), inputs)
    for scale, (ours, theirs) in enumerate(zip(near, exact, strict=True)):
        assert ours.shape == theirs.shape and ours.isfinite().all()
        assert torch.allclose(ours, theirs, atol=1e-4) == (scale not in LATE)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_each_approximation_is_exact_where_it_leaves_nothing_out(small, inputs, approximate, monkeypatch):
    _, transformer = small
    monkeypatch.setattr(approximations, "LATE", 0)
    monkeypatch.setattr(approximations, "COARSE", 36)
    exact = logits(ScaleModel(transformer, [0, 3], SampleConfig()), inputs)
    near = logits(ApproximateScaleModel(transformer, [0, 3], SampleConfig(approximate=approximate)), inputs)
    for ours, theirs in zip(near, exact, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_late_scales_without_guidance_are_conditional_ones(small, inputs):
    _, transformer = small
    near = logits(ApproximateScaleModel(transformer, [0, 3], SampleConfig(approximate="guidance", cfg=3)), inputs)
    conditional = logits(ScaleModel(transformer, [0, 3], SampleConfig(cfg=0)), inputs)
    for scale in LATE:
        assert torch.allclose(near[scale], conditional[scale], atol=1e-4)


@torch.inference_mode()
def test_half_the_tokens_are_computed_and_the_others_restored(small, inputs, monkeypatch):
    _, transformer = small
    model, seen = ApproximateScaleModel(transformer, [0, 3], SampleConfig(approximate="tokens")), []
    step = Transformer.step
    monkeypatch.setattr(Transformer, "step", lambda self, x, *rest: seen.append(x.shape[1]) or step(self, x, *rest))
    change = {}
    for scale, given in enumerate(inputs):
        monkeypatch.setattr(model, "normalized", lambda x, scale=scale, given=given: x - model.entering(scale, given))
        change[scale] = model.hidden(scale, given)
    assert seen == [1, 4, 25, 18, 32]
    for scale in LATE:
        chosen = pivotal(inputs[scale], SIDES[scale] ** 2 // 2).repeat(2, 1)
        other = torch.ones(4, SIDES[scale] ** 2, dtype=torch.bool).scatter(1, chosen, False)
        before = resized_map(change[scale - 1], SIDES[scale])
        assert torch.allclose(change[scale][other], before[other], atol=1e-5)
        assert not torch.isclose(change[scale][~other], before[~other]).all(-1).any()


def test_tokens_far_from_the_mean_are_pivotal():
    input_BlC = torch.zeros(2, 9, 4)
    input_BlC[0, 3], input_BlC[0, 5, 1], input_BlC[1, 8] = 1, -3, 2
    assert pivotal(input_BlC, 2)[0].tolist() == [5, 3]
    assert pivotal(input_BlC, 1)[1].tolist() == [8]


def test_maps_are_resized_in_place():
    flat = torch.full((2, 25, 3), 0.5)
    assert torch.equal(resized_map(flat, 8), torch.full((2, 64, 3), 0.5))
    rising = torch.arange(2.0).repeat(2)[None, :, None]
    assert resized_map(rising, 4)[0, :, 0].view(4, 4)[2].tolist() == [0, 0.25, 0.75, 1]


def test_every_other_key_of_middle_scales_is_forgotten(small, inputs):
    _, transformer = small
    exact = ScaleModel(transformer, [0, 3], SampleConfig())
    near = ApproximateScaleModel(transformer, [0, 3], SampleConfig(approximate="cache"))
    logits(exact, inputs[:3]), logits(near, inputs[:3])
    assert near.starts == [0, 1, 5, 18, 36, 68]
    for ours, theirs in zip(near.cache.kv, exact.cache.kv, strict=True):
        assert torch.equal(ours[..., :5, :], theirs[..., :5, :])
        assert torch.equal(ours[..., 5:18, :], theirs[..., 5:30:2, :])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("approximate", SOME)
def test_captured_approximations_draw_the_same_tokens(small, approximate, kind, monkeypatch):
    config, expected = SampleConfig(approximate=approximate), []
    for seed in range(3):
        expected.append(tokens_of(small, config, (seed, 4), (seed, 9)))
    monkeypatch.setattr(dispatch, "for_gpu", lambda transformer: kind == "fused")
    runner = GraphRunner(taped, never)
    for seed in range(3):
        drawn = tokens_of(small, config, (seed, 4), (seed, 9), runner=runner)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn, expected[seed], strict=True))


@pytest.mark.slow
def test_no_approximation_waits_for_the_gpu(monkeypatch):
    models, phases = released(16, 2), Phases(Watch(), [])
    with pretended(monkeypatch, *models), torch.inference_mode():
        *_, last = generate(*models, [0, 0], [1, 2], SampleConfig(approximate=",".join(APPROXIMATIONS)), runner=phases)
    assert last.f_hat.is_cuda
