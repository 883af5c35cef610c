"""Linear maps in int8: close to plain ones, token by token, and refused where they cannot be right."""

import pytest
import torch
from torch import nn

from support import reference
from varcli.acceleration import devices
from varcli.acceleration.devices import block_weight, check_int8
from varcli.acceleration.dispatch import prepare
from varcli.acceleration.int8 import Int8Linear, rounded
from varcli.config import SampleConfig
from varcli.errors import UsageError
from varcli.sampling.sampler import generate

CPU = torch.device("cpu")

needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no VNNI")


def test_rounding_keeps_the_largest_and_the_ratios():
    x_NI = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [100.0, 50.0, -100.0]])
    int8_NI, scale_N1 = rounded(x_NI)
    assert int8_NI.tolist() == [[64, -127, 32], [0, 0, 0], [127, 64, -127]]
    assert torch.allclose(int8_NI * scale_N1, x_NI, atol=0.4)


@torch.inference_mode()
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_vnni), "cuda"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 40)])
def test_int8_is_close_and_each_token_has_its_own_scale(device, shape):
    """The way of CUDA is tried on the CPU, which knows its product of integers too."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 96), torch.randn(*shape, 64)
    x *= torch.logspace(-3, 3, shape[0] * shape[1]).view(*shape, 1)
    found = Int8Linear(linear, torch.zeros(96), torch.device(device), torch.float32)(x)
    exact = x @ linear.weight.T
    assert found.shape == exact.shape
    assert ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 0.02


@torch.inference_mode()
def test_sums_that_fp16_cannot_hold_are_scaled_in_float32():
    """The way of CUDA, the only device that computes in int8 and fp16."""
    linear, x = nn.Linear(4096, 8, bias=False), torch.full((1, 2, 4096), 0.01)
    linear.weight.fill_(2.0)
    found = Int8Linear(linear, torch.ones(8), torch.device("cuda"), torch.float16)(x.half())
    assert found.dtype == torch.float16
    assert torch.allclose(found.float(), torch.tensor(4096 * 0.02 + 1), rtol=0.01)


@needs_vnni
def test_models_in_int8_sample_and_know_their_precision():
    models = reference.load("mini")
    for _ in range(2):  # twice is once
        prepare(models.tokenizer, models.transformer, CPU, "int8")
    assert isinstance(models.transformer.blocks[0].ffn.fc1, Int8Linear)
    assert block_weight(models.transformer).dtype == models.tokenizer.post_quant_conv.weight.dtype
    one = list(generate(models.tokenizer, models.transformer, [3], [1], SampleConfig()))
    two = list(generate(models.tokenizer, models.transformer, [3], [1], SampleConfig()))
    assert torch.equal(one[-1].tokens, two[-1].tokens)


def test_int8_is_refused_where_sums_would_overflow(monkeypatch):
    monkeypatch.setattr(devices.torch.cpu, "_is_vnni_supported", lambda: False)
    for name in ("cpu", "mps"):
        with pytest.raises(UsageError, match=rf"^--quantize int8 needs CUDA or .* VNNI, and {name} is neither"):
            check_int8(torch.device(name))
    check_int8(torch.device("cuda"))
