"""Filters keep what the original keeps; draws follow the distribution and each image's own seed."""

import pytest
import torch

from varcli.sampling.token_sampling import (
    best,
    candidates,
    generators,
    gumbel_softmax,
    gumbels,
    sample_tokens,
    uniforms,
)


def survivors(logits_BlV, top_k, top_p):
    found = candidates(logits_BlV, top_k, top_p)
    kept = torch.zeros_like(logits_BlV, dtype=torch.bool)
    return kept.scatter(-1, found.order, found.logits.isfinite())


def test_filters_match_original(original):
    logits = original.outputs["filter.logits"]
    checked = 0
    for name, theirs in original.outputs.items():
        if name.startswith("filter.k"):
            top_k, top_p = name.removeprefix("filter.k").split(".p", 1)
            assert torch.equal(survivors(logits, int(top_k), float(top_p)), theirs), name
            checked += 1
    assert checked == 5


@pytest.mark.parametrize("count", [1, 20, 50])
def test_the_best_come_first_and_of_equal_ones_the_first(count):
    logits_BlV = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0)).mul(3).round()
    logits_BlV[0, 0, :4] = torch.tensor([1e30, -torch.inf, 1e-40, -1e-40])
    found, order = best(logits_BlV.transpose(1, 2).contiguous().transpose(1, 2), count)
    expected = logits_BlV.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found, expected.values[..., :count])
    assert torch.equal(order, expected.indices[..., :count])


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_a_broken_logit_is_not_passed_over(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    logits_BlV, infinite = torch.randn(1, 2, 50), torch.tensor(torch.inf)
    logits_BlV[0, 0, 3], logits_BlV[0, 1, 4] = infinite - infinite, -(infinite - infinite)
    found, order = best(logits_BlV, 5)
    assert found[0, :, 0].isnan().all() and order[0, :, 0].tolist() == [3, 4]
    assert torch.equal(found[0, :, 1:], logits_BlV.nan_to_num(-torch.inf).topk(4).values[0])


def test_best_token_always_stays():
    logits = torch.tensor([[[5.0, 1.0, 0.0]]])
    assert survivors(logits, 0, 1e-9).tolist() == [[[True, False, False]]]
    assert survivors(logits, 0, 1.0).all()


@pytest.mark.parametrize("top_k", [0, 3, 99])
def test_top_k_beyond_the_codebook_is_all_of_it(top_k):
    found = candidates(torch.randn(1, 2, 3), top_k, 0)
    assert found.order.shape == (1, 2, 3)


def test_draw_inverts_the_cumulative_distribution():
    probability = torch.tensor([0.1, 0.5, 0.4])
    found = candidates(probability.log().view(1, 1, 3).expand(1, 6, 3), 0, 0)
    drawn = sample_tokens(found, torch.tensor([[0.0, 0.49, 0.51, 0.89, 0.91, 1 - 2**-24]]))
    assert drawn.tolist() == [[1, 1, 2, 2, 0, 0]]


def test_draw_never_gives_a_dropped_token():
    torch.manual_seed(0)
    found = candidates(torch.randn(1, 200, 50), 10, 0.5)
    drawn = sample_tokens(found, torch.full((1, 200), 1 - 2**-24))
    rank = (found.order == drawn.unsqueeze(-1)).int().argmax(-1, keepdim=True)
    assert found.logits.gather(-1, rank).isfinite().all()


def test_draws_follow_the_probabilities():
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    count = 40_000
    found = candidates(logits.view(1, 1, 4).expand(1, count, 4), 0, 0)
    drawn = sample_tokens(found, uniforms(generators([0], [0]), count))
    share = torch.bincount(drawn[0], minlength=4) / count
    assert (share - logits.softmax(0)).abs().max() < 0.01


def test_top_k_1_is_greedy():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    drawn = sample_tokens(candidates(logits, 1, 0.9), torch.rand(2, 5))
    assert torch.equal(drawn, logits.argmax(-1))


def test_random_numbers_belong_to_seed_and_class():
    both = uniforms(generators([3, 4], [7, 7]), 5)
    assert torch.equal(uniforms(generators([4], [7]), 5)[0], both[1])
    others = [uniforms(generators([seed], [row]), 5)[0] for seed, row in [(3, 8), (3 + 2**32, 7), (4, 7)]]
    assert all(not torch.equal(both[0], other) for other in others)
    assert torch.equal(gumbels(generators([3, 4], [7, 7]), 2, 3)[1], gumbels(generators([4], [7]), 2, 3)[0])


def test_mixture_sharpens_to_the_winner_of_the_noisy_race():
    found = candidates(torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2)), 0, 0.9)
    noise = gumbels(generators([0], [0]), 4, 6)
    weights = gumbel_softmax(found, noise, 1.0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4))
    assert torch.equal(weights.argmax(-1), (2 * found.logits + noise).argmax(-1))
    assert (weights[~found.logits.isfinite()] == 0).all()
    assert gumbel_softmax(found, noise, 0.0).max(-1).values.mean() < weights.max(-1).values.mean()
