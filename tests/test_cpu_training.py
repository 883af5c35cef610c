"""What makes training in bf16 fast on a CPU is held to torch's own operations, values and gradients."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.acceleration import dispatch
from varcli.acceleration.cpu_training import ProductAttention, SigmoidGelu, attend_by_products
from varcli.acceleration.dispatch import compile_networks, prepare_training
from varcli.config import TokenizerConfig, TransformerConfig
from varcli.models.autoencoder import Norm, repeat_pixels
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer

CPU = torch.device("cpu")
CONFIG = TransformerConfig(depth=2, width=128, sides=(1, 2, 4), codebook_size=32, codebook_width=8, class_count=3)
BEFORE_LAST = 5
"""Tokens before the last of these scales."""
SHAPE = TokenizerConfig(sides=(1, 2), codebook_size=32, codebook_width=32, base_width=32, multipliers=(1, 2))


def transformer() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def logits_and_gradients(model: Transformer, length: int) -> list[Tensor]:
    torch.manual_seed(1)
    logits_BLV = model.eval()(torch.tensor([0, 2]), torch.randn(2, length - 1, CONFIG.codebook_width))
    logits_BLV.float().square().mean().backward()
    return [logits_BLV, *(weight.grad for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("length", [1, BEFORE_LAST, CONFIG.length])
def test_products_are_the_attention_with_a_bias(length):
    """Of all scales, of the first ones that a shortened step has, and of one token."""
    plain, fast = transformer(), transformer()
    attend_by_products(fast)
    for expected, found in zip(logits_and_gradients(plain, length), logits_and_gradients(fast, length), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_products_where_every_token_sees_all():
    q_BhLc, k_BhLc, v_BhLc = torch.randn(3, 2, 1, 9, 16)
    expected = F.scaled_dot_product_attention(q_BhLc, k_BhLc, v_BhLc)
    torch.testing.assert_close(ProductAttention()(q_BhLc, k_BhLc, v_BhLc), expected)


@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
def test_in_bf16_they_are_as_near_to_float32_as_torchs_own(temperature):
    models = transformer(), transformer(), transformer()
    for model in models:
        for block in model.blocks:
            nn.init.constant_(block.attn.scale_mul_1H11, math.log(temperature))
    plain, fused, fast = models
    attend_by_products(fast)
    exact = logits_and_gradients(plain, CONFIG.length)
    with torch.autocast("cpu", torch.bfloat16):
        torchs, ours = (logits_and_gradients(model, CONFIG.length) for model in (fused, fast))
    right, theirs, own = (
        torch.cat([each.detach().float().flatten() for each in some]) for some in (exact, torchs, ours)
    )
    assert 0 < (own - right).norm() < 1.5 * (theirs - right).norm()


def test_gelu_by_a_sigmoid_is_the_tanh_form():
    x = torch.linspace(-9, 9, 1001, requires_grad=True)
    grads = []
    for gelu in (nn.GELU(approximate="tanh"), SigmoidGelu()):
        y = gelu(x)
        grads.append((y, *torch.autograd.grad(y.sum(), x)))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


def test_repeated_pixels_are_nearest_neighbour_interpolation():
    x_BCHW = torch.randn(2, 3, 4, 5, requires_grad=True)
    weight = torch.randn(2, 3, 8, 10)
    expected, found = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"), repeat_pixels(x_BCHW)
    assert torch.equal(found, expected)
    (right,) = torch.autograd.grad((expected * weight).sum(), x_BCHW)
    torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), x_BCHW)[0], right)
    with torch.no_grad():
        assert torch.equal(repeat_pixels(x_BCHW), expected)


def test_a_single_value_per_group_is_normalized_to_the_bias():
    norm = Norm(32)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(torch.randn(1, 32, 1, 1)), norm.bias.view(1, 32, 1, 1), rtol=0, atol=1e-3)


def test_training_normalizes_in_float32_and_sampling_in_the_precision_of_the_weights():
    norm, x_BCHW = Norm(32).bfloat16(), torch.randn(1, 32, 4, 4).bfloat16()
    with torch.no_grad():
        assert norm(x_BCHW).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        found = norm.float()(x_BCHW)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.group_norm(x_BCHW.float(), 32, norm.weight, norm.bias, 1e-6))


def by_products(model: nn.Module) -> set[bool]:
    return {type(module.attend) is ProductAttention for module in model.modules() if hasattr(module, "attend")}


def test_long_sequences_keep_no_attention_weights():
    for sides, chosen in (((1, 2, 22), True), ((1, 2, 23), False)):
        model = Transformer(dataclasses.replace(CONFIG, sides=sides))
        attend_by_products(model)
        assert by_products(model) == {chosen}


@pytest.mark.parametrize(
    ("device", "bf16", "chosen"), [("cpu", True, True), ("cpu", False, False), ("meta", True, False)]
)
def test_products_are_chosen_in_bf16_on_a_cpu(device, bf16, chosen, monkeypatch):
    kept = []
    monkeypatch.setattr(dispatch, "keep_freed_memory", lambda: kept.append(1))
    for model in (Tokenizer(SHAPE), transformer()):
        prepare_training(model, torch.device(device), bf16=bf16)
        assert by_products(model) == {chosen}
    assert len(kept) == (2 if device == "cpu" else 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
def test_compiled_blocks_compute_what_plain_ones_do():
    model = transformer()
    expected = logits_and_gradients(model, CONFIG.length)
    model.zero_grad(set_to_none=True)
    compile_networks(model, CPU)
    assert all(isinstance(block.ffn.gelu, SigmoidGelu) for block in model.blocks)
    torch.testing.assert_close(logits_and_gradients(model, CONFIG.length), expected, rtol=1e-4, atol=1e-6)
