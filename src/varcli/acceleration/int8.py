"""Linear layers in int8: one scale per output feature for the weights, one per token for the inputs.

The products are exact sums of integers; the cost of rounding is measured in benchmarks/sampling.py.

Shapes: N tokens, I and O features in and out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.acceleration.onednn import ROWS_EXPECTED
from varcli.models.transformer import Transformer

LARGEST = 127
"""The integer that the largest magnitude of a row becomes."""

FEWEST_ROWS = 32
"""Least number of rows that CUDA's kernel multiplies."""


class Int8Linear(nn.Module):
    """A linear layer with weights of one byte; its output has the precision of its bias."""

    weight: Tensor
    scale_O: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear, bias_O: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        """Quantize a linear layer for a device, with output of the given precision."""
        super().__init__()
        weight_OI, scale_O1 = rounded(linear.weight.detach().float())
        self.on_cpu = device.type == "cpu"
        self.register_buffer("scale_O", scale_O1.squeeze(1))
        self.register_buffer("bias", bias_O.detach().to(dtype))
        if self.on_cpu:  # oneDNN packs them, into a tensor that cannot be moved or copied
            self.packed = torch.ops.onednn.qlinear_prepack(weight_OI, [ROWS_EXPECTED, weight_OI.shape[1]])
            self.zeros_O = torch.zeros(len(weight_OI), dtype=torch.int64)
        else:
            self.register_buffer("weight", weight_OI)

    def forward(self, x_BlI: Tensor) -> Tensor:
        """Return an approximation of x·Wᵀ + b, (B, l, O)."""
        token_NI, scale_N1 = rounded(x_BlI.flatten(0, 1).float())
        product_NO = self.multiply_on_cpu(token_NI) if self.on_cpu else self.multiply_on_cuda(token_NI)
        return product_NO.mul_(scale_N1).add_(self.bias).to(self.bias.dtype).unflatten(0, x_BlI.shape[:2])

    def multiply_on_cpu(self, token_NI: Tensor) -> Tensor:
        """Return the products times the weights' scales; the CPU's instructions take an unsigned left side."""
        unsigned_NI = token_NI.view(torch.uint8).bitwise_xor_(128)
        product_NO: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned_NI,
            1.0,
            128,
            self.packed,
            self.scale_O,
            self.zeros_O,
            None,
            1.0,
            0,
            self.bias.dtype,
            "none",
            [],
            "",
        )
        return product_NO

    def multiply_on_cuda(self, token_NI: Tensor) -> Tensor:
        """Return the products times the weights' scales, in float32: before the tokens' scales fp16 may overflow."""
        padded_NI = F.pad(token_NI, (0, 0, 0, max(0, FEWEST_ROWS - len(token_NI))))
        product_NO = torch._int_mm(padded_NI, self.weight.T)[: len(token_NI)]
        return product_NO * self.scale_O


def rounded(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows as int8, and their scales, (N, 1)."""
    scale_N1 = x_NI.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (x_NI / scale_N1).round_().to(torch.int8), scale_N1


def quantize(transformer: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Replace each block's linear layers with int8 versions, except those of the modulation, used once per image."""
    model: Any = transformer  # its parts change their types
    for block in model.blocks:
        attn, ffn = block.attn, block.ffn
        if isinstance(attn.proj, Int8Linear):
            return
        attn.mat_qkv = Int8Linear(attn.mat_qkv, attn.bias, device, dtype)
        attn.proj = Int8Linear(attn.proj, attn.proj.bias, device, dtype)
        ffn.fc1 = Int8Linear(ffn.fc1, ffn.fc1.bias, device, dtype)
        ffn.fc2 = Int8Linear(ffn.fc2, ffn.fc2.bias, device, dtype)
