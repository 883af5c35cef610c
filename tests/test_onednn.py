"""Packed linear maps compute what plain ones do, and stand aside where they cannot."""

import copy
import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from support import reference
from varcli.acceleration import onednn
from varcli.acceleration.devices import block_weight, keep_freed_memory
from varcli.acceleration.dispatch import prepare
from varcli.acceleration.onednn import PackedLinear, pack, packing_works
from varcli.config import SampleConfig
from varcli.sampling import naive
from varcli.sampling.sampler import ScaleModel, generate

CPU = torch.device("cpu")
FORCED = 4
"""Scales of the mini reference."""

needs_packing = pytest.mark.skipif(not packing_works(torch.float32), reason="this torch packs no weights")


@needs_packing
@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1, 7), (3, 130), (2, 1, 20)])
def test_packed_equals_plain(shape):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 96), torch.randn(*shape, 64)
    assert torch.allclose(PackedLinear(linear)(x), linear(x), atol=1e-5)
    gelu = nn.GELU(approximate="tanh")
    assert torch.allclose(PackedLinear(linear, gelu=True)(x), gelu(linear(x)), atol=1e-5)
    other_O = torch.randn(96)
    assert torch.allclose(PackedLinear(linear, other_O)(x), x @ linear.weight.T + other_O, atol=1e-5)


@needs_packing
def test_plain_weights_are_let_go_and_packing_twice_is_packing_once():
    models = reference.load("mini")
    prepare(models.tokenizer, models.transformer, CPU, "fp32")
    first = models.transformer.blocks[0]
    prepare(models.tokenizer, models.transformer, CPU, "fp32")
    assert not [m for m in first.modules() if isinstance(m, nn.Linear)]
    assert isinstance(models.transformer.head, PackedLinear)
    assert block_weight(models.transformer).dtype == torch.float32


def test_tokens_equal_those_of_the_naive_sampler_on_unprepared_models():
    models = reference.load("mini")
    untouched = copy.deepcopy((models.tokenizer, models.transformer))
    prepare(models.tokenizer, models.transformer, CPU, "fp32")
    for seed in range(3):
        results = list(generate(models.tokenizer, models.transformer, [3], [seed], SampleConfig()))
        tokens, _ = naive.sample(*untouched, 3, seed, SampleConfig())
        assert all(torch.equal(result.tokens[0], t) for result, t in zip(results, tokens, strict=True))


def test_without_onednn_everything_stays_plain(monkeypatch):
    monkeypatch.setattr(onednn, "packing_works", lambda dtype: False)
    models = reference.load("mini")
    pack(models.transformer)
    assert not any(isinstance(module, PackedLinear) for module in models.transformer.modules())


def test_a_precision_without_kernels_is_found_out(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not packing_works.__wrapped__(torch.float32)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert not packing_works.__wrapped__(torch.complex64)


def forced_logits(precision):
    """Yield the logits of each scale after the reference's own tokens, without free-running ones to diverge."""
    models = reference.load("mini")
    if precision:
        prepare(models.tokenizer, models.transformer, CPU, precision)
    model = ScaleModel(models.transformer, [1], SampleConfig(cfg=1.5))
    tokens = [models.outputs[f"tokens.{k}"][:1].long() for k in range(FORCED)]
    inputs = models.tokenizer.quantize.teacher_input(tokens)
    sides = models.transformer.config.sides
    for scale, given in enumerate([None, *inputs.split([side * side for side in sides[1:]], dim=1)]):
        yield model.logits(scale, given)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(("precision", "difference"), [("fp32", 2e-6), ("bf16", 6e-3), ("int8", 2e-2)])
def test_precisions_stay_close_on_forced_tokens(precision, difference):
    if precision == "int8" and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no VNNI")
    exact = torch.cat(list(forced_logits("")), dim=1)
    logits = torch.cat(list(forced_logits(precision)), dim=1)
    assert (logits - exact).abs().mean() < difference * exact.std()
    assert (logits.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("platform", "most", "calls"),
    [
        ("linux", 2**30, [(-3, 2**30), (-1, 2**31 - 1)]),
        ("linux", 2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]),
        ("linux", 0, [(-3, 2**30), (-3, 2**25)]),
        ("darwin", 2**30, []),
    ],
    ids=["glibc", "glibc before 2.35", "refused", "not Linux"],
)
def test_glibc_is_asked_to_keep_freed_memory(monkeypatch, platform, most, calls):
    """The mmap threshold is M_MMAP_THRESHOLD = -3, and the trim threshold M_TRIM_THRESHOLD = -1."""
    asked = []

    def mallopt(name, value):
        asked.append((name, value))
        return int(name == -1 or value <= most)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(sys, "platform", platform)
    keep_freed_memory.__wrapped__()
    assert asked == calls


def test_a_libc_without_mallopt_is_left_alone(monkeypatch):
    opened = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: opened.append(name) or object())
    monkeypatch.setattr(sys, "platform", "linux")
    keep_freed_memory.__wrapped__()
    assert opened == [None]
