"""The one place that chooses the fast path.

`prepare` and `fastest_blocks` make plain models fast to sample, `prepare_training` and `compile_networks` to train.

Triton kernels are used where they work, and torch's operations elsewhere. Triton comes with torch wherever CUDA does on
Linux; it needs a compiler, a driver and a GPU that is not too old, in more combinations than can be tested. So each
kernel is tried on the spot, once per process.

Shapes: B images or batch entries, l tokens, L tokens of all scales, D width, h heads of c channels, C channels, H and W
rows and columns.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from varcli.acceleration.cpu_training import SigmoidGelu, attend_by_products
from varcli.acceleration.cuda_blocks import FusedBlocks, GpuBlock, ScaleCache, for_gpu
from varcli.acceleration.devices import (
    DTYPES,
    block_weight,
    check_int8,
    keep_freed_memory,
    out_of_memory,
    pick_dtype,
)
from varcli.acceleration.flex_attention import use_flex_attention
from varcli.acceleration.int8 import quantize
from varcli.acceleration.onednn import CpuBlock, GrowingCache, for_cpu, pack
from varcli.config import HEAD_WIDTH
from varcli.errors import RunError
from varcli.models.autoencoder import NormSilu, Upsample
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Block, KeyValueCache, Transformer

NormKernel = Callable[[nn.GroupNorm, Tensor], Tensor]


def prepare(tokenizer: Tokenizer, transformer: Transformer, device: torch.device, precision: str) -> None:
    """Make both models ready for sampling: evaluation mode, device, precision by name, memory layout.

    Only the linear layers of the blocks and the decoder, which take the time, are in 16 bits. The residual stream, the
    token embeddings, the logits and the sampling of tokens stay in float32.

    With "int8" the linear layers have int8, and everything else the precision of "auto".

    Afterwards the models cannot be moved or copied: their weights have the layout of the device.

    Raises:
        RunError: the device's memory cannot hold the models.
        UsageError: the device does not compute with int8.
    """
    dtype = DTYPES[pick_dtype("auto", device) if precision == "int8" else precision]
    if precision == "int8":
        check_int8(device)
        quantize(transformer, device, dtype)
    linear = [layer for layer in transformer.blocks.modules() if isinstance(layer, nn.Linear)]
    decoding = (tokenizer.post_quant_conv, tokenizer.decoder)
    try:
        for part in (*linear, *decoding):
            part.to(dtype)  # before the move, which then takes half the memory
        tokenizer.to(device).eval()
        transformer.to(device).eval()
        for part in decoding:
            part.to(memory_format=torch.channels_last)
        fuse = device.type == "cuda" and dtype != torch.float32
        for part in tokenizer.decoder.modules():
            if isinstance(part, NormSilu):
                part.kernel = norm_kernel(device, dtype) if fuse else None
            elif isinstance(part, Upsample) and device.type == "cpu":
                part.split()
        if device.type == "cuda":
            fix_cuda_settings()
        elif device.type == "cpu":
            pack(transformer)
            keep_freed_memory()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"the model does not fit into the memory of {device}; use a smaller one, --dtype bf16 or --device cpu"
        ) from error


def prepare_training(
    model: Tokenizer | Transformer, device: torch.device, *, bf16: bool, flex_attention: bool = False
) -> None:
    """Make the training of a model on its device fast. What it computes stays the same, to rounding."""
    if flex_attention and isinstance(model, Transformer):
        use_flex_attention(model)
    if device.type == "cpu":
        keep_freed_memory()
        if bf16:
            attend_by_products(model)


def compile_networks(model: Tokenizer | Transformer, device: torch.device, perceptual: object = None) -> None:
    """Have torch.compile make the networks faster, at their first step; on a CPU with another form of GELU.

    Args:
        model: to train.
        device: of the model.
        perceptual: the perceptual loss of a tokenizer; only LPIPS is compiled, EfficientNet-lite0 would be slower.
    """
    torch.compiler.reset()  # what it compiled for other models counts against its limit
    if isinstance(model, Tokenizer):
        networks: list[nn.Module] = [model.encoder, model.decoder]
        # Not the last layer: the adaptive weight needs its gradient alone, and a compiled graph computes all its own.
        last = cast("Any", model.decoder.conv_out)
        last.forward = torch.compiler.disable(last.forward)
        from varcli.models.perceptual import LPIPS  # not for sampling, which imports this module

        if isinstance(perceptual, LPIPS):
            networks.append(perceptual)
    else:
        networks = list(model.blocks)
        if device.type == "cpu":
            for block in networks:
                cast("Block", block).ffn.gelu = SigmoidGelu()
    for network in networks:
        network.compile()


def fix_cuda_settings() -> None:
    """Fix settings whose defaults differ between versions of torch: images and speed depend on them."""
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions in full precision
    torch.backends.cuda.enable_cudnn_sdp(False)  # slower than flash attention here, and slow to plan each shape


@contextmanager
def cuda_settings_restored() -> Iterator[None]:
    """Restore at the end what `fix_cuda_settings` changes for the whole process."""
    tf32, cudnn_sdp = torch.backends.cudnn.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cuda.enable_cudnn_sdp(cudnn_sdp)


class Blocks(Protocol):
    """A transformer's blocks: its own, or faster ones in their place."""

    def modulations(self, class_BD: Tensor) -> list[Tensor]:
        """What the class does in each block."""

    def step(self, x_BlD: Tensor, modulations: list[Tensor], cache: Any) -> Tensor:
        """Return the residual stream of one scale after all blocks, having stored what later scales need."""


def fastest_blocks(transformer: Transformer) -> tuple[Blocks, type[KeyValueCache]]:
    """Return the fastest blocks for a transformer's device and precision, and the cache that they use."""
    weight = block_weight(transformer)
    if for_gpu(transformer):
        return FusedBlocks(transformer, gpu_block(weight.device, weight.dtype)), ScaleCache
    if for_cpu(transformer):
        return FusedBlocks(transformer, CpuBlock), GrowingCache
    return transformer, KeyValueCache


@cache
def gpu_block(device: torch.device, dtype: torch.dtype) -> type[GpuBlock]:
    """Return the block with Triton's kernels between its products if they work, else the one without."""
    try:
        from varcli.acceleration.triton_kernels import KernelBlock

        agree = _close(_between_products(GpuBlock, device, dtype), _between_products(KernelBlock, device, dtype))
    except Exception:  # Triton raises many kinds of errors
        return GpuBlock
    return KernelBlock if agree else GpuBlock


@cache
def norm_kernel(device: torch.device, dtype: torch.dtype) -> NormKernel | None:
    """Return Triton's kernels for `NormSilu` if they work, else None."""
    norm = NormSilu(96).to(device, dtype)
    for parameter, end in zip(norm.parameters(), (5.0, 7.0), strict=True):
        parameter.data = torch.linspace(1, end, 96, device=device).cos_().to(dtype)
    x_BHWC = torch.linspace(-3, 5, 2 * 19 * 13 * 96, device=device).sin_().to(dtype).view(2, 19, 13, 96)
    x_BCHW = x_BHWC.permute(0, 3, 1, 2)
    try:
        from varcli.acceleration.triton_kernels import norm_silu

        with torch.no_grad():
            return norm_silu if _close([norm_silu(norm, x_BCHW)], [norm(x_BCHW)]) else None
    except Exception:  # as above
        return None


def _between_products(kind: type[GpuBlock], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return all that a kind of block computes between its products, for 2 rows, 5 tokens and 3 heads."""
    width = 3 * HEAD_WIDTH
    x_BlD = torch.linspace(-2, 3, 2 * 5 * width, device=device).sin_().view(2, 5, width)
    ada_B13D = torch.linspace(0, 9, 2 * 3 * width, device=device).cos_().view(2, 1, 3, width)
    gamma, factor, shift = ada_B13D.unbind(2)
    h_BlD = x_BlD.square().to(dtype)
    before_BlD = kind.residual_norm(x_BlD, None, factor, shift, dtype)
    after_BlD = kind.residual_norm(x_BlD, (h_BlD, gamma), shift, factor, dtype)
    qkv_Bl3D = torch.linspace(1, 50, 2 * 5 * 3 * width, device=device).sin_().to(dtype).view(2, 5, 3, width)
    kv_2BhLc = torch.zeros(2, 2, 3, 7, HEAD_WIDTH, device=device, dtype=dtype)
    temperature_h1 = torch.arange(1.0, 4.0, device=device)[:, None]
    q_Bhlc = kind.normalize(qkv_Bl3D.unflatten(3, (3, HEAD_WIDTH)), temperature_h1, *kv_2BhLc[:, :, :, 2:])
    return [x_BlD, before_BlD, after_BlD, q_Bhlc, kv_2BhLc]


def _close(these: list[Tensor], those: list[Tensor]) -> bool:
    """Whether tensors differ by rounding to 16 bits at most."""
    pairs = zip(these, those, strict=True)
    return all(torch.allclose(one.float(), other.float(), rtol=0.02, atol=0.02) for one, other in pairs)
