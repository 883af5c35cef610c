"""Editing equals the original in paper mode; by default no masked pixel shows through and no kept one changes."""

import numpy as np
import pytest
import torch

from support import reference
from varcli.acceleration.dispatch import prepare
from varcli.config import SampleConfig
from varcli.errors import RunError
from varcli.images.blending import feather_mask
from varcli.images.masks import box_mask
from varcli.images.tiling import plan_squares, plan_whole
from varcli.models.tokenizer import Quantizer
from varcli.models.transformer import Transformer
from varcli.sampling import editing
from varcli.sampling.editing import (
    EditConfig,
    Edited,
    Editor,
    best,
    keep_as_released,
    keep_by_coverage,
    log_likelihoods,
)
from varcli.sampling.sampler import Keep, generate

GREEDY = SampleConfig(cfg=0, top_k=1, top_p=0)
SIDES = (1, 2, 3, 4)
NOISE = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def mini():
    found = reference.load("mini")
    prepare(found.tokenizer, found.transformer, torch.device("cpu"), "fp32")
    return found


def editor(models, config=GREEDY, **rule):
    return Editor(models.tokenizer, models.transformer, config, EditConfig(**rule))


def hole(*box, side=64):
    return box_mask(box, (side, side))


def test_paper_mode_equals_the_original(original):
    given = original.outputs["image_u8"][0].permute(1, 2, 0).numpy()
    for i, edit in enumerate(original.edits):
        keep_44 = original.outputs[f"edit.{i}.keep_mask"].numpy()
        mask = np.kron(keep_44, np.ones((16, 16))) == 0
        config = SampleConfig(cfg=edit["cfg"], top_k=1, top_p=0)
        edited = editor(original, config, released_rule=True).edit(given, plan_whole(mask), edit["label"], 0)
        expected = original.outputs[f"edit.{i}.image"][0].permute(1, 2, 0).numpy()
        assert np.abs(edited.pixels / 255 - expected).max() < 0.51 / 255


def test_the_released_keep_rule():
    kept = keep_as_released(torch.from_numpy(hole(16, 16, 48, 48)), SIDES)
    assert [int(k.sum()) for k in kept] == [1, 4, 8, 12]
    assert kept[2].tolist()[0][4] is False
    assert keep_as_released(torch.ones(64, 64).bool(), SIDES)[0].all()
    assert not any(k.any() for k in keep_as_released(torch.ones(64, 64).bool(), SIDES)[1:])


def test_the_default_keep_rule():
    sides = (1, 2, 4, 8)
    kept = keep_by_coverage(torch.from_numpy(hole(24, 24, 40, 40)), sides)
    assert kept[0].all() and kept[1].all()
    last = kept[-1].view(8, 8)
    assert not last[2:6, 2:6].any() and int(last.sum()) == 64 - 16  # two tokens marked, one grown around
    half = keep_by_coverage(torch.from_numpy(hole(0, 0, 32, 64)), sides)
    assert half[1].all() and half[2].view(4, 4)[:, 2:].all() and not half[2].view(4, 4)[:, :2].any()
    assert keep_by_coverage(torch.from_numpy(hole(0, 0, 33, 64)), sides)[1].tolist() == [[False, True, False, True]]
    one = torch.zeros(64, 64, dtype=torch.bool)
    one[31, 31] = True
    assert int((~keep_by_coverage(one, sides)[-1]).sum()) == 9
    assert not any(k.any() for k in keep_by_coverage(torch.from_numpy(hole(0, 0, 63, 64)), sides))


@pytest.mark.parametrize("side", [64, 50, 96])
def test_no_masked_pixel_shows_through(mini, side):
    """Whatever is in the hole, the result is the same to the last bit."""
    given = np.random.RandomState(1).randint(0, 256, (side, side, 3)).astype(np.uint8)
    mask = hole(20, 10, 40, 35, side=side)
    other = given.copy()
    other[mask] = 255 - other[mask]
    first, second = (
        editor(mini, SampleConfig()).edit(pixels, plan_squares(mask, 64), 3, 0) for pixels in (given, other)
    )
    assert np.array_equal(first.pixels, second.pixels)
    assert not np.array_equal(first.pixels[mask], given[mask])


@pytest.mark.parametrize("feather", [None, 0, 3])
def test_kept_pixels_outside_the_feather_do_not_change(mini, feather):
    mask = hole(30, 5, 50, 64)
    edited = editor(mini, SampleConfig(), feather=feather).edit(NOISE, plan_squares(mask, 64), 3, 0)
    width = 8 if feather is None else feather
    assert np.array_equal(edited.pixels[feather_mask(mask, width) == 0], NOISE[feather_mask(mask, width) == 0])
    assert (edited.pixels[mask] != NOISE[mask]).any()
    if width:
        soft = (feather_mask(mask, width) > 0) & ~mask
        assert (edited.pixels[soft] != NOISE[soft]).any()


@pytest.mark.parametrize(
    ("size", "holes", "most"),
    [
        ((1200, 900), [(40, 40, 56, 56), (1150, 860, 1166, 876)], 2 * (32**2 - 16**2)),
        ((1200, 900), [(100, 100, 140, 140), (1199, 899, 1200, 900)], 60**2 - 40**2 + 9**2 - 1),
        (
            (300, 300),
            [(20 + 90 * i, 20 + 90 * j, 22 + 90 * i, 22 + 90 * j) for i in range(3) for j in range(3)],
            9 * 320,
        ),
        ((300, 1), [(100, 0, 103, 1)], 16),
    ],
    ids=["two holes", "a stray pixel", "dust", "one row"],
)
def test_holes_far_apart_change_only_what_is_near_them(mini, size, holes, most):
    """Each has the feather of its own square: 8 pixels, or half a token of a larger one."""
    mask = np.logical_or.reduce([box_mask(box, size) for box in holes])
    given = np.random.RandomState(0).randint(0, 256, (*mask.shape, 3)).astype(np.uint8)
    edited = editor(mini, SampleConfig()).edit(given, plan_squares(mask, 64), 3, 0)
    changed = (edited.pixels != given).any(axis=2)
    assert (changed & ~mask).sum() <= most and changed[mask].mean() > 0.9
    assert not changed[feather_mask(mask, 10) == 0].any()


def test_without_compositing_all_comes_from_the_decoder(mini):
    mask = hole(30, 5, 50, 64)
    edited = editor(mini, composite=False).edit(NOISE, plan_squares(mask, 64), 3, 0)
    assert (edited.pixels != NOISE).any(axis=2).mean() > 0.99


def test_only_the_squares_go_through_the_model(mini):
    large = np.random.RandomState(2).randint(0, 256, (200, 300, 3)).astype(np.uint8)
    mask = box_mask((100, 50, 120, 80), (300, 200))
    edited = editor(mini, composite=False).edit(large, plan_squares(mask, 64), 3, 0)
    changed = (edited.pixels != large).any(axis=2)
    assert changed.sum() > 0.98 * 64**2 and not changed[:, :60].any() and not changed[120:].any()


def test_steps_see_what_the_steps_before_made(mini):
    """A panorama's later squares depend on the image through the earlier ones."""
    mask = ~box_mask((0, 0, 64, 64), (192, 64))
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, :64] = NOISE
    first = editor(mini).edit(wide, plan_squares(mask, 64), 3, 0)
    wide[:, :64] = 255 - NOISE
    second = editor(mini).edit(wide, plan_squares(mask, 64), 3, 0)
    assert len(first.seams) == 4
    assert (first.pixels[:, 160:] != second.pixels[:, 160:]).any()


def test_seeds_and_classes_decide(mini):
    mask = hole(0, 0, 40, 64)
    make = editor(mini, SampleConfig(cfg=2)).edit
    again = make(NOISE, plan_squares(mask, 64), 3, 5).pixels
    assert np.array_equal(make(NOISE, plan_squares(mask, 64), 3, 5).pixels, again)
    assert (make(NOISE, plan_squares(mask, 64), 3, 6).pixels != again).any()
    assert (make(NOISE, plan_squares(mask, 64), 4, 5).pixels != again).any()


def test_the_image_as_it_grows(mini):
    edited = editor(mini).edit(NOISE, plan_squares(hole(0, 0, 40, 64), 64), 3, 0, growing=True)
    assert len(edited.frames) == len(SIDES)
    assert np.array_equal(edited.frames[-1], edited.pixels)
    assert (edited.frames[0] != edited.pixels).any()
    assert editor(mini).edit(NOISE, plan_squares(hole(0, 0, 40, 64), 64), 3, 0).frames == []


@torch.no_grad()
def test_likelihood_is_that_of_the_new_tokens(mini):
    masks = [torch.zeros(1, side**2, dtype=torch.bool) for side in SIDES]
    masks[-1][:, 5:] = True
    tokens = mini.tokenizer.encode(torch.from_numpy(NOISE).permute(2, 0, 1)[None] / 127.5 - 1)
    drawn = [
        r.tokens for r in generate(mini.tokenizer, mini.transformer, [3], [0], SampleConfig(), keep=Keep(tokens, masks))
    ]
    [found] = log_likelihoods(mini.transformer, mini.tokenizer, drawn, Keep(tokens, masks), 3)
    logits = mini.transformer(torch.tensor([3]), mini.tokenizer.quantize.teacher_input(drawn)).log_softmax(-1)
    expected = [float(logits[0, i, token]) for i, token in enumerate(torch.cat(drawn, 1)[0]) if i < 14 + 5]
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_best_has_a_smooth_seam_and_likely_tokens():
    rough, odd, good = (
        Edited(NOISE, i, [seam], [log]) for i, (seam, log) in enumerate([(30, -4), (10, -9), (11, -4.1)])
    )
    assert best([rough, odd, good]) is good
    assert best([rough]) is rough


def test_editing_in_16_bits():
    half = reference.load("mini")
    prepare(half.tokenizer, half.transformer, torch.device("cpu"), "bf16")
    edited = editor(half, SampleConfig()).edit(NOISE, plan_squares(hole(0, 0, 40, 64), 64), 3, 0, scored=True)
    assert edited.log_likelihood < 0 < edited.seam


def test_no_class_takes_no_second_pass(mini, monkeypatch):
    seen = []
    monkeypatch.setattr(
        editing, "generate", lambda *args, **kwargs: seen.append(args[4].cfg) or generate(*args, **kwargs)
    )
    for row in (10, 3):
        editor(mini, SampleConfig(cfg=3)).edit(NOISE, plan_squares(hole(0, 0, 40, 64), 64), row, 0)
    assert seen == [0, 3]


def test_an_edit_costs_a_sample_and_an_encode(mini, monkeypatch):
    """The likelihood, which takes one more pass, is for those who ask."""
    calls = []
    quantize, forward = Quantizer.quantize, Transformer.forward
    monkeypatch.setattr(Quantizer, "quantize", lambda *args: calls.append("encode") or quantize(*args))
    monkeypatch.setattr(Transformer, "forward", lambda *args: calls.append("forward") or forward(*args))
    editor(mini).edit(NOISE, plan_squares(hole(0, 0, 40, 64), 64), 3, 0)
    assert calls == ["encode"]
    editor(mini).edit(NOISE, plan_squares(hole(0, 0, 40, 64), 64), 3, 0, scored=True)
    assert calls[1:] == ["encode", "forward"]


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate 2 GiB", "shapes cannot be multiplied"])
def test_memory_that_runs_out_is_no_bug(mini, monkeypatch, words):
    def fail(*_, **__):
        raise RuntimeError(words)

    monkeypatch.setattr(editing, "generate", fail)
    expected = RunError if "memory" in words else RuntimeError
    with pytest.raises(expected, match=r"the edit does not fit into memory|multiplied"):
        editor(mini).edit(NOISE, plan_squares(hole(0, 0, 40, 64), 64), 3, 0)
