"""Linear layers and convolutions packed for the processor, by oneDNN.

The results are the same, twice as fast in float32 and more in 16 bits.

A weight is brought once into the order in which the processor's kernels read it, which torch otherwise does not do
(float32) or does anew each time (16 bits). `nn.Linear` is the specification.

Shapes: N rows, I and O features in and out; B images, C and O channels, K × L the kernel; ... any dimensions.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.acceleration.cuda_blocks import advanced
from varcli.config import HEAD_WIDTH, TransformerConfig
from varcli.models.transformer import Block, KeyValueCache, Transformer

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
    """Whether this build of torch, on this processor, multiplies with packed weights of a precision."""
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
    """Whether a layer is a linear map that was not replaced yet, and can be."""
    return isinstance(layer, nn.Linear) and packing_works(layer.weight.dtype)


# --- blocks in bf16 and int8 -----------------------------------------------------------------------


STEEP = 64
"""Temperatures up to this leave 2^score within 2^±93, so that in bf16 (2^±127) there is room for sums over thousands
of tokens, weighted with values up to millions."""


class GrowingCache(KeyValueCache):
    """Keys and values of a block in one piece at every scale, as products want them; other layouts are copied first."""

    def __init__(self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        nothing_2Bh0c = torch.empty((2, batch, config.heads, 0, HEAD_WIDTH), device=device, dtype=dtype)
        self.kv = [nothing_2Bh0c] * config.depth
        self.filled = 0

    def until(self, block: int, end: int) -> Tensor:
        """Return new memory for a block's first `end` tokens with those there are: (2, B, h, end, c)."""
        before_2BhLc = self.kv[block]
        self.kv[block] = before_2BhLc.new_empty((*before_2BhLc.shape[:3], end, HEAD_WIDTH))
        self.kv[block][:, :, :, : self.filled] = before_2BhLc[:, :, :, : self.filled]
        return self.kv[block]


class CpuBlock:
    """One block's two branches, from and to the precision of its weights."""

    advance = staticmethod(advanced)

    def __init__(self, block: Block) -> None:
        attn = block.attn
        self.proj, self.feed, self.heads = attn.proj, block.ffn, attn.heads
        self.dtype = attn.proj.bias.dtype
        self.qkv: Callable[[Tensor], Tensor] = attn.mat_qkv
        if attn.mat_qkv.bias is None:  # it was not packed, and its bias with it
            self.qkv = partial(F.linear, weight=attn.mat_qkv.weight, bias=attn.bias.to(self.dtype))
        temperature_h1 = attn.temperature_h1
        self.steep = bool(temperature_h1.max() > STEEP)
        # Queries and keys are brought to their lengths in one pass: to the temperature, in base 2, and to 1.
        self.factor_2h1 = torch.stack([temperature_h1 * math.log2(math.e), torch.ones_like(temperature_h1)])

    def attend(self, x_BlD: Tensor, number: int, cache: KeyValueCache) -> Tensor:
        """What each token gathers from its own scale and those before it, (B, l, D)."""
        qkv_Bl3hc = self.qkv(x_BlD).unflatten(2, (3, self.heads, HEAD_WIDTH))
        qk_Bl2hc = qkv_Bl3hc[:, :, :2].float()
        length_Bl2h1 = torch.linalg.vector_norm(qk_Bl2hc, dim=-1, keepdim=True)
        qk_Bl2hc *= self.factor_2h1 / length_Bl2h1.clamp_min_(1e-12)
        q_Bhlc, k_Bhlc = qk_Bl2hc.permute(2, 0, 3, 1, 4)
        k_BhLc, v_BhLc = cache.append(number, k_Bhlc, qkv_Bl3hc[:, :, 2].transpose(1, 2))
        q_Bhlc = q_Bhlc.to(self.dtype, memory_format=torch.contiguous_format)
        h_Nlc = gather(q_Bhlc.flatten(0, 1), k_BhLc.flatten(0, 1), v_BhLc.flatten(0, 1), steep=self.steep)
        return self.proj(h_Nlc.view_as(q_Bhlc).transpose(1, 2).flatten(2))


def gather(q_Nlc: Tensor, k_NLc: Tensor, v_NLc: Tensor, *, steep: bool) -> Tensor:
    """Return softmax(q·kᵀ·ln 2)·v, (N, l, c): attention with the logarithm's base in the queries.

    A softmax takes the largest score from all others lest the exponential overflow. Queries and keys of unit length
    bound their scores by the temperature, so that this is left out unless one is `steep`. Scores are rounded to bf16,
    which torch's own attention does not do: at high temperatures that costs precision.
    """
    weight_NlL = q_Nlc @ k_NLc.mT
    if steep:
        weight_NlL -= weight_NlL.amax(-1, keepdim=True)
    weight_NlL.exp2_()
    return (weight_NlL @ v_NLc).div_(weight_NlL.sum(-1, keepdim=True))


def for_cpu(transformer: Transformer) -> bool:
    """Whether these blocks can stand in for a transformer's own: in bf16, or int8 with it, on a processor."""
    biases = [cast("Tensor", block.attn.proj.bias) for block in cast("Iterable[Block]", transformer.blocks)]
    return all(bias.device.type == "cpu" and bias.dtype == torch.bfloat16 for bias in biases)
