"""Linear maps in int8: weights rounded once, an output feature at a time, inputs as they come, a token at a time.

The products are exact sums of integers; what rounding costs is measured in benchmarks/sampling.py.

Shapes: N tokens, I and O features in and out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.acceleration.onednn import ROWS_EXPECTED
from varcli.models.transformer import Transformer

LARGEST = 127
"""What the largest magnitude of a row becomes."""

FEWEST_ROWS = 32
"""Fewer are not multiplied by CUDA's kernel."""


class Int8Linear(nn.Module):
    """A linear map with weights of one byte; its results have the precision of its bias."""

    weight: Tensor
    scale_O: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear, bias_O: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        """Take a linear map's weights, to be used on a device and with results of a precision."""
        super().__init__()
        weight_OI, scale_O1 = rounded(linear.weight.detach().float())
        self.on_cpu = device.type == "cpu"
        self.register_buffer("scale_O", scale_O1.squeeze(1))
        self.register_buffer("bias", bias_O.detach().to(dtype))
        if self.on_cpu:  # oneDNN lays them out anew, in a tensor that knows neither devices nor copies
            self.packed = torch.ops.onednn.qlinear_prepack(weight_OI, [ROWS_EXPECTED, weight_OI.shape[1]])
            self.zeros_O = torch.zeros(len(weight_OI), dtype=torch.int64)
        else:
            self.register_buffer("weight", weight_OI)

    def forward(self, x_BlI: Tensor) -> Tensor:
        """Return about x·Wᵀ + b, (B, l, O)."""
        token_NI, scale_N1 = rounded(x_BlI.flatten(0, 1).float())
        product_NO = self.on_processor(token_NI) if self.on_cpu else self.on_cuda(token_NI)
        return product_NO.mul_(scale_N1).add_(self.bias).to(self.bias.dtype).unflatten(0, x_BlI.shape[:2])

    def on_processor(self, token_NI: Tensor) -> Tensor:
        """Return the products times the weights' scales; the processor's instructions want the left side unsigned."""
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

    def on_cuda(self, token_NI: Tensor) -> Tensor:
        """Return the products times the weights' scales, in float32: before the tokens' scales fp16 may overflow."""
        padded_NI = F.pad(token_NI, (0, 0, 0, max(0, FEWEST_ROWS - len(token_NI))))
        product_NO = torch._int_mm(padded_NI, self.weight.T)[: len(token_NI)]
        return product_NO * self.scale_O


def rounded(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows as int8, and (N, 1) what to multiply them with to have them back."""
    scale_N1 = x_NI.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (x_NI / scale_N1).round_().to(torch.int8), scale_N1


def quantize(transformer: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the blocks' linear maps by such in int8; those of the modulation, used once an image, stay."""
    model: Any = transformer  # its parts change their types
    for block in model.blocks:
        attn, ffn = block.attn, block.ffn
        if isinstance(attn.proj, Int8Linear):
            return
        attn.mat_qkv = Int8Linear(attn.mat_qkv, attn.bias, device, dtype)
        attn.proj = Int8Linear(attn.proj, attn.proj.bias, device, dtype)
        ffn.fc1 = Int8Linear(ffn.fc1, ffn.fc1.bias, device, dtype)
        ffn.fc2 = Int8Linear(ffn.fc2, ffn.fc2.bias, device, dtype)
