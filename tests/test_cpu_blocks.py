"""Blocks for a processor compute what the plain ones do, scale after scale, and remember what the plain cache does."""

import math

import pytest
import torch

from support import reference
from varcli.acceleration.cuda_blocks import FusedBlocks
from varcli.acceleration.dispatch import fastest_blocks, prepare
from varcli.acceleration.int8 import quantize
from varcli.acceleration.onednn import STEEP, CpuBlock, GrowingCache, for_cpu, gather
from varcli.config import SampleConfig, TransformerConfig
from varcli.models.transformer import KeyValueCache, Transformer
from varcli.sampling.scale_model import ScaleModel

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SIDES = (1, 2, 3, 4, 6)


def transformer(*, shared_adaln=False, dtype=torch.float32, temperature=4.0):
    config = TransformerConfig(
        depth=3, width=128, class_count=5, sides=SIDES, codebook_size=96, codebook_width=8, shared_adaln=shared_adaln
    )
    model = Transformer(config).eval()
    reference.set_rule_weights(model)
    for block in model.blocks:
        torch.nn.init.constant_(block.attn.scale_mul_1H11, torch.tensor(temperature).log())
    for layer in model.blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.to(dtype)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("shared_adaln", [False, True], ids=["adaln", "shared"])
@pytest.mark.parametrize("temperature", [4.0, 100.0], ids=["flat", "steep"])
def test_they_are_as_near_to_float32_as_the_plain_blocks(shared_adaln, temperature):
    exact, half = (
        transformer(shared_adaln=shared_adaln, dtype=dtype, temperature=temperature) for dtype in (torch.float32, BF16)
    )
    blocks, source = FusedBlocks(half, CpuBlock), torch.Generator().manual_seed(0)
    assert blocks.blocks[0].steep == (temperature > STEEP)
    class_BD = torch.randn(3, exact.config.width, generator=source)
    ours, theirs = GrowingCache(exact.config, 3, CPU, BF16), KeyValueCache(exact.config, 3, CPU, torch.float32)
    rounded, errors = KeyValueCache(exact.config, 3, CPU, BF16), []
    for side in SIDES:
        x_BlD = torch.randn(3, side * side, exact.config.width, generator=source)
        true = exact.step(x_BlD, exact.modulations(class_BD), theirs)
        with torch.autocast("cpu", BF16):
            plain_BlD = half.step(x_BlD, [ada.float() for ada in half.modulations(class_BD)], rounded)
        fused_BlD = blocks.step(x_BlD.clone(), blocks.modulations(class_BD), ours)
        assert fused_BlD.dtype == torch.float32
        errors.append([(got - true).square().mean() for got in (fused_BlD, plain_BlD)])
    of_fused, of_plain = torch.tensor(errors).mean(0).sqrt()
    assert of_fused <= 1.1 * of_plain


@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_attention_is_a_softmax_at_every_temperature_it_is_used_for(steep, sign):
    """Also where every score is the largest or the smallest there can be."""
    torch.manual_seed(0)
    temperature = 100 if steep else STEEP
    k_NLc = torch.nn.functional.normalize(torch.randn(4, 9, 16) + 100, dim=-1).to(BF16)
    q_Nlc = (sign * temperature * math.log2(math.e) * k_NLc[:, :5].float()).to(BF16)
    v_NLc = torch.randn(4, 9, 16).to(BF16)
    score_NlL = (q_Nlc @ k_NLc.mT).float() * math.log(2)
    assert score_NlL.abs().max() > 0.98 * temperature
    expected = score_NlL.softmax(-1) @ v_NLc.float()
    found = gather(q_Nlc, k_NLc, v_NLc, steep=steep)
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)


def test_without_the_maximum_the_largest_sums_can_be_held():
    """Ten thousand tokens at the highest temperature that is not steep, whose values are a million."""
    assert 2.0 ** (STEEP * math.log2(math.e)) * 10_000 * 1e6 < torch.finfo(BF16).max


def test_a_growing_cache_remembers_what_the_plain_one_does():
    config = transformer().config
    growing, plain = (kind(config, 2, CPU, torch.float32) for kind in (GrowingCache, KeyValueCache))
    for side in SIDES[:4]:
        k_Bhlc, v_Bhlc = torch.randn(2, 2, config.heads, side * side, 64)
        for block in range(config.depth):
            ours, theirs = (cache.append(block, k_Bhlc + block, v_Bhlc) for cache in (growing, plain))
            assert all(map(torch.equal, ours, theirs))
            assert ours[0].is_contiguous()
        for cache in (growing, plain):
            cache.advance(side * side)
            if side == 3:
                cache.halve(5, 14)
                cache.filled = 10
    shorter = growing.first_rows(1)
    assert torch.equal(shorter.until(1, 26)[1, :, :, :26], plain.kv[1][1, :1, :, :26])
    assert shorter.filled == growing.filled


@pytest.mark.parametrize(("precision", "stand_in"), [("fp32", False), ("bf16", True), ("fp16", False), ("int8", True)])
def test_they_stand_in_where_bf16_is_computed_in(precision, stand_in):
    model = transformer()
    if precision == "int8":
        quantize(model, CPU, BF16)
    else:
        model = transformer(dtype={"fp32": torch.float32, "bf16": BF16, "fp16": torch.float16}[precision])
    assert for_cpu(model) == stand_in
    blocks, cache = fastest_blocks(model)
    assert isinstance(blocks, FusedBlocks) == stand_in
    assert (cache is GrowingCache) == stand_in


@torch.inference_mode()
def test_a_prepared_model_uses_them():
    models = reference.load("mini")
    prepare(models.tokenizer, models.transformer, CPU, "bf16")
    model = ScaleModel(models.transformer, [1], SampleConfig())
    assert model.logits(0, None).dtype == torch.float32
    assert model.cache.kv[0].shape[3] == 1
