"""Linear layers and convolutions with weights packed for the CPU, by oneDNN.

The results are the same, in float32 twice as fast, in 16 bits faster still.

A weight is packed once into the order in which the CPU's kernels read it, which torch otherwise does not do (float32)
or does again in each call (16 bits). `nn.Linear` is the specification.

Shapes: N rows, I and O features in and out; B images, C and O channels, K × L the kernel; ... any dimensions.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.acceleration.cuda_blocks import residual_norm
from varcli.config import HEAD_WIDTH, TransformerConfig
from varcli.models.transformer import Block, KeyValueCache, Transformer

ROWS_EXPECTED = 512
"""Number of rows that the packing is optimized for; inputs may have others."""


class PackedLinear(nn.Module):
    """A linear layer with a packed weight; it computes in the weight's precision."""

    def __init__(self, linear: nn.Linear, bias_O: Tensor | None = None, *, gelu: bool = False) -> None:
        """Pack a linear layer, with its bias unless one is given; `gelu` fuses the tanh form of GELU."""
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
    """A convolution with ReLU and a packed float32 weight.

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
    """Whether this build of torch, on this CPU, multiplies with packed weights of a precision."""
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
    """Replace the linear layers that take the time by packed ones, where that works; plain weights are freed."""
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
    """Whether a layer is a plain linear layer that can be packed."""
    return isinstance(layer, nn.Linear) and packing_works(layer.weight.dtype)


# --- blocks in bf16 and int8 -----------------------------------------------------------------------


STEEP = 64
"""Up to this temperature 2^score is within 2^±93, so that bf16 (2^±127) has room for sums over thousands of tokens,
weighted with values up to millions."""


class GrowingCache(KeyValueCache):
    """Keys and values of each block, contiguous at every scale, as matrix products need them without a copy."""

    def __init__(self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        nothing_2Bh0c = torch.empty((2, batch, config.heads, 0, HEAD_WIDTH), device=device, dtype=dtype)
        self.kv = [nothing_2Bh0c] * config.depth
        self.filled = 0

    def until(self, block: int, end: int) -> Tensor:
        """Return new memory for a block's first `end` tokens, with those stored so far: (2, B, h, end, c)."""
        before_2BhLc = self.kv[block]
        self.kv[block] = before_2BhLc.new_empty((*before_2BhLc.shape[:3], end, HEAD_WIDTH))
        self.kv[block][:, :, :, : self.filled] = before_2BhLc[:, :, :, : self.filled]
        return self.kv[block]


class CpuBlock:
    """One block's two branches; input and output have the precision of its weights."""

    residual_norm = staticmethod(residual_norm)

    def __init__(self, block: Block) -> None:
        attn = block.attn
        self.proj, self.feed, self.heads = attn.proj, block.ffn, attn.heads
        self.dtype = attn.proj.bias.dtype
        self.qkv: Callable[[Tensor], Tensor] = attn.mat_qkv
        if attn.mat_qkv.bias is None:  # it was not packed, and its bias with it
            self.qkv = partial(F.linear, weight=attn.mat_qkv.weight, bias=attn.bias.to(self.dtype))
        temperature_h1 = attn.temperature_h1
        self.steep = bool(temperature_h1.max() > STEEP)
        # One pass scales queries to the temperature, in base 2, and keys to length 1.
        self.factor_2h1 = torch.stack([temperature_h1 * math.log2(math.e), torch.ones_like(temperature_h1)])

    def attend(self, x_BlD: Tensor, number: int, cache: KeyValueCache) -> Tensor:
        """Return the attention branch, (B, l, D): over the token's own scale and those before it."""
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

    A softmax subtracts the largest score so that the exponential does not overflow. Queries and keys of unit length
    bound the scores by the temperature, so this is left out unless one is `steep`. Scores are rounded to bf16,
    which torch's own attention does not do: at high temperatures that costs precision.
    """
    weight_NlL = q_Nlc @ k_NLc.mT
    if steep:
        weight_NlL -= weight_NlL.amax(-1, keepdim=True)
    weight_NlL.exp2_()
    return (weight_NlL @ v_NLc).div_(weight_NlL.sum(-1, keepdim=True))


def for_cpu(transformer: Transformer) -> bool:
    """Whether these blocks can replace a transformer's own: in bf16, or int8 with bf16, on a CPU."""
    biases = [cast("Tensor", block.attn.proj.bias) for block in cast("Iterable[Block]", transformer.blocks)]
    return all(bias.device.type == "cpu" and bias.dtype == torch.bfloat16 for bias in biases)
