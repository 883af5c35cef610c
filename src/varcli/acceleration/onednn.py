"""Linear layers and convolutions packed for the processor, by oneDNN.

The results are the same, twice as fast in float32 and more in 16 bits.

A weight is brought once into the order in which the processor's kernels read it, which torch otherwise does not do
(float32) or does anew each time (16 bits). `nn.Linear` is the specification.

Shapes: N rows, I and O features in and out; B images, C and O channels, K × L the kernel; ... any dimensions.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from varcli.models.transformer import Transformer

ROWS_EXPECTED = 512
"""For how many rows a layout is best; others may come."""


class PackedLinear(nn.Module):
    """A linear map whose weight the processor finds in its own order; it computes in the weight's precision."""

    def __init__(self, linear: nn.Linear, bias_O: Tensor | None = None, *, gelu: bool = False) -> None:
        """Take a linear map over, and its bias unless one is given; `gelu`: its tanh form follows in the same pass."""
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_EXPECTED)
        bias_O = linear.bias if bias_O is None else bias_O
        self.bias = None if bias_O is None else bias_O.detach().to(self.weight.dtype)
        self.activation: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x_NI: Tensor) -> Tensor:
        """Return x·Wᵀ + b, (..., O), or GELU of that."""
        x_NI = x_NI.to(self.weight.dtype)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self.weight, self.bias, *self.activation)
        return product


class PackedConvolution:
    """A convolution with ReLU whose float32 weight the processor finds in its own order.

    The order depends on the shape of the input, so the weight is packed for the first one.
    """

    def __init__(self, weight_OCKL: Tensor, bias_O: Tensor, stride: list[int], padding: list[int]) -> None:
        self.weight_OCKL, self.bias_O = weight_OCKL, bias_O
        self.shape: tuple[Any, ...] = (padding, stride, [1, 1], 1)
        self.packed: Tensor | None = None

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """The convolution's output after ReLU, (B, O, H', W')."""
        if self.packed is None:
            pack_weight = torch.ops.mkldnn._reorder_convolution_weight
            self.packed = pack_weight(self.weight_OCKL, *self.shape, list(x_BCHW.shape))
        convolve = torch.ops.mkldnn._convolution_pointwise
        result_BCHW: Tensor = convolve(x_BCHW, self.packed, self.bias_O, *self.shape, "relu", [], "")
        return result_BCHW


@cache
def packing_works(dtype: torch.dtype) -> bool:
    """Return whether this build of torch, on this processor, multiplies with packed weights of a precision."""
    if not torch.backends.mkldnn.is_available():
        return False
    probe = nn.Linear(16, 16, bias=False, dtype=dtype)
    nn.init.eye_(probe.weight)
    try:
        with torch.inference_mode():
            return torch.equal(PackedLinear(probe)(probe.weight), probe.weight)
    except (AttributeError, RuntimeError):  # operations that this version does not have, or not for this precision
        return False


def pack(transformer: Transformer) -> None:
    """Replace the linear maps that take the time by packed ones, where that works; each plain weight is let go."""
    model: Any = transformer  # its parts change their types
    if _packable(model.head):
        model.head = PackedLinear(model.head)
    for block in model.blocks:
        if not model.config.shared_adaln and _packable(block.ada_lin.linear):
            block.ada_lin[1] = PackedLinear(block.ada_lin.linear)
        if _packable(block.attn.proj):
            block.attn.mat_qkv = PackedLinear(block.attn.mat_qkv, block.attn.bias)
            block.attn.proj = PackedLinear(block.attn.proj)
            block.ffn.fc1 = PackedLinear(block.ffn.fc1, gelu=True)
            block.ffn.fc2 = PackedLinear(block.ffn.fc2)
            block.ffn.gelu = nn.Identity()


def _packable(layer: nn.Module) -> bool:
    """Return whether a layer is a linear map that was not replaced yet, and can be."""
    return isinstance(layer, nn.Linear) and packing_works(layer.weight.dtype)
