"""Likelihoods: one pass equals step by step, and pruning finds what scoring everything finds."""

import numpy as np
import pytest
import torch

from support import reference
from varcli.acceleration.dispatch import prepare
from varcli.config import spans
from varcli.errors import ConfigError
from varcli.models.transformer import KeyValueCache
from varcli.sampling import likelihood
from varcli.sampling.likelihood import encodings, log_probabilities, rank_classes
from varcli.sampling.reconstruction import encode

NOISE = np.random.RandomState(0).randint(0, 256, (2, 64, 64, 3)).astype(np.uint8)


def models(precision="fp32", name="mini"):
    found = reference.load(name)
    prepare(found.tokenizer, found.transformer, torch.device("cpu"), precision)
    return found.tokenizer, found.transformer


@torch.no_grad()
def step_by_step(tokenizer, transformer, tokens, rows):
    """One scale after the other with the key-value cache, all logarithms in full: the specification."""
    class_BD = transformer.class_emb(torch.tensor(rows))
    cache = KeyValueCache(transformer.config, len(rows), torch.device("cpu"), torch.float32)
    modulations, input_BlC, found = transformer.modulations(class_BD), None, []
    f_hats = tokenizer.quantize.f_hats(tokens)
    for scale, idx_Bl in enumerate(tokens):
        h_BlD = transformer.step(transformer.scale_input(scale, class_BD, input_BlC), modulations, cache)
        log_BlV = transformer.head(transformer.head_nm(h_BlD, class_BD)).log_softmax(-1)
        found.append(log_BlV.gather(-1, idx_Bl[:, :, None])[:, :, 0])
        if scale + 1 < len(tokens):
            input_BlC = tokenizer.quantize.next_input(f_hats[scale], scale + 1)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", ["mini", "mini_shared"])
def test_one_pass_equals_step_by_step(name):
    tokenizer, transformer = models(name=name)
    tokens = encode(tokenizer, NOISE)
    expected = step_by_step(tokenizer, transformer, tokens, [3, 10])
    torch.testing.assert_close(log_probabilities(tokenizer, transformer, tokens, [3, 10]), expected)
    assert expected.std() > 0.1


def test_the_first_scales_do_not_depend_on_the_others():
    tokenizer, transformer = models()
    tokens = encode(tokenizer, NOISE)
    whole = log_probabilities(tokenizer, transformer, tokens, [3, 4])
    part = log_probabilities(tokenizer, transformer, tokens[:3], [3, 4])
    torch.testing.assert_close(part, whole[:, : spans(tokenizer.config.sides)[2].stop])


def test_one_image_for_many_classes_in_batches_of_any_size(monkeypatch):
    tokenizer, transformer = models()
    tokens = encode(tokenizer, NOISE[:1])
    together = log_probabilities(tokenizer, transformer, tokens, range(5))
    monkeypatch.setattr(likelihood, "_BATCH_BYTES", 1)
    torch.testing.assert_close(log_probabilities(tokenizer, transformer, tokens, torch.arange(5)), together)
    for row in range(5):
        torch.testing.assert_close(together[row], step_by_step(tokenizer, transformer, tokens, [row])[0])


def test_in_16_bits():
    tokens = encode(models()[0], NOISE)
    found = log_probabilities(*models("bf16"), tokens, [3, 10])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.mean(), log_probabilities(*models(), tokens, [3, 10]).mean(), rtol=0.01, atol=0)


def test_without_pruning_classes_are_in_the_order_of_their_likelihoods():
    tokenizer, transformer = models()
    tokens = encode(tokenizer, NOISE[:1])
    count = transformer.config.class_count
    expected = log_probabilities(tokenizer, transformer, tokens, range(count)).sum(1)
    ranked = rank_classes(tokenizer, transformer, tokens, ())
    assert [each.label for each in ranked] == expected.argsort(descending=True).tolist()
    assert [each.nats for each in ranked] == pytest.approx((-expected).sort().values.tolist())
    assert {each.scales for each in ranked} == {len(tokens)}


def test_pruning_goes_down_to_the_last_candidates():
    """Each time by what the tokens of the scales so far say."""
    tokenizer, transformer = models()
    tokens = encode(tokenizer, NOISE[1:])
    count = transformer.config.class_count
    log_RL = log_probabilities(tokenizer, transformer, tokens, range(count))
    until = [span.stop for span in spans(tokenizer.config.sides)]
    by_two = log_RL[:, : until[1]].sum(1).argsort(descending=True).tolist()
    by_three = sorted(by_two[:5], key=lambda row: -log_RL[row, : until[2]].sum())
    by_all = sorted(by_three[:2], key=lambda row: -log_RL[row].sum())
    ranked = rank_classes(tokenizer, transformer, tokens, (5, 2))
    assert [each.label for each in ranked] == by_all + by_three[2:] + by_two[5:]
    assert [each.scales for each in ranked] == [4] * 2 + [3] * 3 + [2] * (count - 5)
    assert len(rank_classes(tokenizer, transformer, tokens, (1000, 999))) == count


@pytest.mark.slow
@pytest.mark.parametrize("candidates", [(3, 10), (5, 5), (0,), (5, 0), (-1,)])
def test_candidates_that_do_not_fall(candidates):
    tokenizer, transformer = models()
    with pytest.raises(ConfigError, match=r"--candidates must be falling numbers such as 10,3, or 0 for no pruning"):
        rank_classes(tokenizer, transformer, encode(tokenizer, NOISE[:1]), candidates)


def test_further_encodings_have_noise():
    tokenizer, transformer = models()
    tokens = encodings(tokenizer, NOISE[0], 3)
    assert all(torch.equal(one[:1], own) for one, own in zip(tokens, encode(tokenizer, NOISE[:1]), strict=True))
    last = tokens[-1]
    changed = (last != last[:1]).float().mean(1)
    assert changed[0] == 0 and 0 < changed[1] < 0.9 and not torch.equal(last[1], last[2])
    assert all(map(torch.equal, tokens, encodings(tokenizer, NOISE[0], 3)))
    log_3 = torch.stack(
        [log_probabilities(tokenizer, transformer, [t[i : i + 1] for t in tokens], [3]).sum() for i in range(3)]
    )
    nats = next(each.nats for each in rank_classes(tokenizer, transformer, tokens, ()) if each.label == 3)
    assert nats == pytest.approx(-float(log_3.mean()), rel=1e-5)
