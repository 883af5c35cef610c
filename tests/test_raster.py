"""The raster-scan baseline is an autoregressive model: cached token by token it computes what it would all at once."""

import pytest
import torch

from support import reference
from test_cuda_graphs import never, taped
from varcli.acceleration import dispatch
from varcli.acceleration.cuda_graphs import GraphRunner
from varcli.acceleration.dispatch import prepare
from varcli.benchmarking.samplers import RasterModel, scan
from varcli.config import SampleConfig, TokenizerConfig, TransformerConfig
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer, normalize
from varcli.sampling.sampler import decode

SIDES = (1, 2, 4)
TOKENS = 16


@pytest.fixture(params=[False, True], ids=["own", "shared"])
def models(request):
    tokenizer = Tokenizer(
        TokenizerConfig(sides=SIDES, codebook_size=48, codebook_width=8, base_width=32, multipliers=(1, 1))
    )
    transformer = Transformer(
        TransformerConfig(
            depth=2,
            width=128,
            sides=SIDES,
            codebook_size=48,
            codebook_width=8,
            class_count=5,
            shared_adaln=request.param,
        )
    )
    reference.set_rule_weights(tokenizer)
    reference.set_rule_weights(transformer)
    return tokenizer.eval(), transformer.eval()


@pytest.mark.parametrize("cfg", [0, 1.5])
@torch.no_grad()
def test_token_by_token_equals_all_at_once(models, cfg):
    tokenizer, transformer = models
    config, rows = SampleConfig(cfg=cfg), torch.tensor([1, 4])
    input_BlC = tokenizer.quantize.embedding(torch.randint(48, (2, TOKENS - 1)))
    cached = RasterModel(transformer, rows, config)
    one_by_one = [
        cached.logits(0, None),
        *(cached.logits(i + 1, part) for i, part in enumerate(input_BlC.split(1, dim=1))),
    ]

    whole = RasterModel(transformer, rows, config)
    x_RlD = torch.cat([whole.inputs(0, None), whole.inputs(1, input_BlC)], dim=1)
    causal = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)[None, None]
    for i, (block, ada) in enumerate(zip(transformer.blocks, whole.work.modulations, strict=True)):
        x_RlD = block(x_RlD, ada, i, causal, None)
    expected = whole.head(normalize(x_RlD, whole.work.final_scale, whole.work.final_shift))
    torch.testing.assert_close(torch.cat(one_by_one, dim=1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_fused_blocks_compute_the_same(models, monkeypatch):
    """As on a GPU, whose cache leaves out the last scale."""
    found = []
    for fused in (False, True):
        monkeypatch.setattr(dispatch, "for_gpu", lambda transformer, fused=fused: fused)
        found.append(scan(*models, [1, 4], [2, 3], SampleConfig()))
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_guidance_mixes_the_two_rows_equally_everywhere(models):
    with_class, without = (
        RasterModel(models[1], torch.tensor([row]), SampleConfig(cfg=0)).logits(0, None) for row in (2, 5)
    )
    guided = RasterModel(models[1], torch.tensor([2]), SampleConfig(cfg=3)).logits(0, None)
    torch.testing.assert_close(guided, 4 * with_class - 3 * without, atol=1e-4, rtol=1e-4)


def test_an_image_is_its_seeds_and_classes_and_all_tokens_are_drawn(models):
    marks = []
    f_BCHW = scan(*models, [1, 2, 1], [0, 0, 1], SampleConfig(), mark=marks.append)
    assert f_BCHW.shape == (3, 8, 4, 4)
    assert marks == ["transformer", "token sampling"] * TOKENS
    assert decode(models[0], f_BCHW).shape == (3, 8, 8, 3)
    again = scan(*models, [1], [0], SampleConfig())
    torch.testing.assert_close(again[0], f_BCHW[0])
    assert not torch.equal(f_BCHW[0], f_BCHW[1]) and not torch.equal(f_BCHW[0], f_BCHW[2])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@torch.no_grad()
def test_models_made_ready_for_sampling_compute_the_same(models, precision):
    rows = torch.tensor([1])
    exact = RasterModel(models[1], rows, SampleConfig(cfg=0)).logits(0, None)
    prepare(*models, torch.device("cpu"), precision)
    ready = RasterModel(models[1], rows, SampleConfig(cfg=0)).logits(0, None)
    assert (ready - exact).abs().mean() < (1e-5 if precision == "fp32" else 0.02) * exact.std()
    assert scan(*models, [1], [0], SampleConfig()).dtype == torch.float32


def test_captured_steps_draw_the_same(models):
    """As on a GPU: the first batch as it is, the second captured, the third replayed."""
    runner = GraphRunner(taped, never)
    for seed in range(3):
        recorded = scan(*models, [1, 3], [seed, 7], SampleConfig(), runner=runner).clone()
        assert torch.equal(recorded, scan(*models, [1, 3], [seed, 7], SampleConfig()))
    assert len(runner.graphs) == 1 + 2 * TOKENS
