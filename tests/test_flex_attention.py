"""FlexAttention is held to scaled_dot_product_attention with the block-causal bias."""

import pytest
import torch

from varcli.acceleration.flex_attention import FlexAttention
from varcli.config import TransformerConfig
from varcli.models.transformer import Transformer

CONFIG = TransformerConfig(depth=2, width=128, sides=(1, 2, 4), codebook_size=32, codebook_width=8, class_count=3)


def model_of(device: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG).to(device).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def use(model: Transformer, *, compiled: bool) -> FlexAttention:
    attend = FlexAttention(model.lvl_1L[0], compiled=compiled)
    for block in model.blocks:
        block.attn.attend = attend
    return attend


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("scales", [1, 2, 3])
def test_logits_are_those_of_attention_with_a_bias(scales):
    """Of all scales, and of the first ones that a shortened step has."""
    model = model_of("cpu")
    length = sum(side * side for side in CONFIG.sides[:scales])
    label_B = torch.tensor([0, 2])
    input_BLC = torch.randn(2, length - 1, CONFIG.codebook_width)
    with torch.no_grad():
        expected_BLV = model(label_B, input_BLC)
        attend = use(model, compiled=False)
        torch.testing.assert_close(model(label_B, input_BLC), expected_BLV, rtol=1e-4, atol=1e-5)
    assert list(attend.masks) == [length]


@pytest.mark.gpu
def test_gradients_are_those_of_attention_with_a_bias():
    label_B = torch.tensor([0, 2], device="cuda")
    input_BLC = torch.randn(2, CONFIG.length - 1, CONFIG.codebook_width, device="cuda")
    gradients = []
    for flex in (False, True):
        model = model_of("cuda")
        if flex:
            use(model, compiled=True)
        model(label_B, input_BLC).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-4)
