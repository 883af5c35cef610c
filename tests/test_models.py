"""The models compute what the original implementation computes, under the released names."""

import json

import pytest
import torch
import torch.nn.functional as F

from support import reference
from varcli.config import GRID_256, GRID_512, TokenizerConfig, TransformerConfig, sides_of_length
from varcli.models.tokenizer import Tokenizer, nearest_tick, resizing
from varcli.models.transformer import Block, StochasticDepth, Transformer


def assert_close(ours, theirs):
    """Agree within 1e-4 of the largest magnitude."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def per_scale(outputs, prefix):
    return [outputs[f"{prefix}.{k}"] for k in range(sum(name.startswith(f"{prefix}.") for name in outputs))]


@torch.no_grad()
def test_tokenizer_matches_original(original):
    image = original.outputs["image_u8"] / 127.5 - 1
    features = original.tokenizer.features(image)
    assert_close(features, original.outputs["encoder_features"])
    quantized = original.tokenizer.quantize.quantize(features)
    for ours, theirs in zip(quantized.tokens, per_scale(original.outputs, "tokens"), strict=True):
        assert torch.equal(ours, theirs.long())
    for ours, theirs in zip(quantized.f_hats, per_scale(original.outputs, "f_hat"), strict=True):
        assert_close(ours, theirs)
    assert_close(original.tokenizer.decode(quantized.tokens), original.outputs["reconstruction"])


@torch.no_grad()
def test_encode_then_f_hats_is_quantize(original):
    image = original.outputs["image_u8"] / 127.5 - 1
    tokens = original.tokenizer.encode(image)
    f_hats = original.tokenizer.quantize.f_hats(tokens)
    for ours, theirs in zip(f_hats, per_scale(original.outputs, "f_hat"), strict=True):
        assert_close(ours, theirs)


def test_transformer_matches_original(original):
    outputs, model = original.outputs, original.transformer
    tokens = [t.long() for t in per_scale(outputs, "tokens")]
    with torch.no_grad():
        teacher_input = original.tokenizer.quantize.teacher_input(tokens)
    assert_close(teacher_input, outputs["teacher_input"])
    label = outputs["labels"][: len(tokens[0])].long()
    logits = model(label, teacher_input)
    assert_close(logits.detach(), outputs["logits"])
    loss = F.cross_entropy(logits.flatten(0, 1), torch.cat(tokens, 1).flatten())
    assert_close(loss.detach(), outputs["loss"])
    loss.backward()
    for name, parameter in model.named_parameters():
        if f"grad_norm.{name}" in outputs:
            assert_close(parameter.grad.norm(), outputs[f"grad_norm.{name}"])
    model.zero_grad()


@pytest.mark.parametrize(("name", "depth", "sides"), [("d16", 16, GRID_256), ("d36", 36, GRID_512)])
def test_released_shapes(name, depth, sides):
    released = json.loads((reference.FIXTURES / f"released_{name}.keys.json").read_text())
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig(sides=sides))
        transformer = Transformer(
            TransformerConfig(
                depth=depth,
                width=64 * depth,
                sides=sides,
                codebook_size=4096,
                codebook_width=32,
                shared_adaln=depth == 36,
            )
        )
    assert {k: list(v.shape) for k, v in tokenizer.state_dict().items()} == released["vae"]
    assert {k: list(v.shape) for k, v in transformer.state_dict().items()} == released["var"]
    assert sides_of_length(transformer.config.length) == sides


def test_nearest_tick():
    assert [nearest_tick(k / 9, 4) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [nearest_tick(ratio, 4) for ratio in (0, 0.5, 1)] == [0, 2, 3]
    assert [nearest_tick(ratio, 2) for ratio in (0, 0.5, 1)] == [0, 0, 1]
    assert nearest_tick(0.7, 1) == 0


@pytest.mark.parametrize("mode", ["bicubic", "area"])
@pytest.mark.parametrize(("side", "target"), [(1, 8), (3, 8), (8, 3), (13, 16), (16, 13), (8, 8)])
def test_resizing_is_interpolation(side, target, mode):
    torch.manual_seed(0)
    h = torch.randn(2, 3, side, side)
    matrix = resizing(side, target, mode)
    expected = F.interpolate(h, size=(target, target), mode=mode)
    assert torch.allclose(matrix @ h @ matrix.T, expected, atol=1e-5)


def test_stochastic_depth_drops_branches_and_keeps_their_mean():
    torch.manual_seed(0)
    drop = StochasticDepth(0.3).train()
    branch = torch.ones(20_000, 1, 1)
    dropped = drop(branch)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(drop.eval()(branch), branch)
    config = TransformerConfig(depth=3, width=64, sides=(1, 2), codebook_size=8, codebook_width=4)
    rates = [block.drop_path.probability for block in Transformer(config).blocks]
    assert rates == pytest.approx([0, 0.1 * 3 / 24 / 2, 0.1 * 3 / 24])


def test_a_sample_whose_gates_are_dropped_passes_a_block_unchanged():
    torch.manual_seed(0)
    config = TransformerConfig(depth=1, width=64, sides=(1, 2), codebook_size=8, codebook_width=4)
    block = Block(config, drop=0.5).train()
    x_BlD, ada_B16D = torch.randn(64, 3, 64), torch.randn(64, 1, 6, 64)
    gates_B16D = block.drop_gates(ada_B16D)
    dropped_B2 = (gates_B16D[:, 0, :2] == 0).all(2)
    assert 0 < int(dropped_B2.all(1).sum()) < 64
    after_BlD = block(x_BlD, gates_B16D, 0, None, None)
    assert torch.equal((after_BlD == x_BlD).all(2).all(1), dropped_B2.all(1))
    kept_ND = gates_B16D[:, 0, :2][~dropped_B2]
    torch.testing.assert_close(kept_ND, 2 * ada_B16D[:, 0, :2][~dropped_B2])
    assert torch.equal(block.eval().drop_gates(ada_B16D), ada_B16D)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("rows", [[None], [(0, 4), (2, 4)]])
def test_blocks_of_any_depth_are_compiled_once(rows):
    """Beyond eight versions torch.compile leaves the others as they are. Parts of a batch add none."""
    torch.compiler.reset()
    config = TransformerConfig(depth=12, width=64, sides=(1, 2), codebook_size=8, codebook_width=4, class_count=2)
    model = Transformer(config).train()
    versions = []

    def count(graph, inputs):
        versions.append(graph)
        return graph.forward

    for block in model.blocks:
        block.compile(backend=count)
    for part in rows:
        for block in model.blocks:
            block.drop_path.rows = part
        model(torch.tensor([0, 1]), torch.randn(2, 4, 4))
    assert len(versions) == 1
