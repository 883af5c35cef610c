"""Run by test_kernels in a process of its own, in which Triton interprets its kernels instead of compiling them."""

import sys

import torch

from varcli.acceleration.cuda_blocks import FusedBlocks, GpuBlock, ScaleCache
from varcli.acceleration.dispatch import gpu_block, norm_kernel
from varcli.acceleration.triton_kernels import KernelBlock, norm_silu
from varcli.config import TransformerConfig
from varcli.models.autoencoder import NormSilu
from varcli.models.transformer import Transformer

CPU = torch.device("cpu")


def compare(heads: int, dtype: torch.dtype) -> None:
    """Fail unless both kinds of blocks give the same residual stream and keep the same keys and values."""
    shape = {"sides": (1, 2, 3), "codebook_size": 16, "codebook_width": 8, "class_count": 3}
    config = TransformerConfig(depth=2, width=64 * heads, **shape)
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=2.0 if "scale_mul" in name else 0.2)
    for layer in model.blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.to(dtype)
    kinds = [FusedBlocks(model, kind) for kind in (GpuBlock, KernelBlock)]
    caches = [ScaleCache(config, 4, CPU, dtype) for _ in kinds]
    class_BD = torch.randn(4, config.width)
    for side in config.sides:
        x_BlD = torch.randn(4, side * side, config.width)
        found = []
        for blocks, cache in zip(kinds, caches, strict=True):
            modulations = blocks.modulations(class_BD)
            if side == 3:  # as an approximation without guidance does
                found.append(blocks.step(x_BlD[:2].clone(), [ada[:2] for ada in modulations], cache.first_rows(2)))
            else:
                found.append(blocks.step(x_BlD.clone(), modulations, cache))
        close(*found, dtype)
    for ours, theirs in zip(*(cache.kv for cache in caches), strict=True):
        close(ours, theirs, dtype)


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    """Fail unless they differ by rounding; Triton's interpreter cuts off where it makes bf16."""
    error = ((ours.float() - theirs.float()).abs().mean() / theirs.float().std()).item()
    assert error < {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype], (error, dtype)


class Swapped(KernelBlock):
    """Keys where the values belong."""

    @staticmethod
    def normalize(qkv_Bl3hc, temperature_h1, k_Bhlc, v_Bhlc):
        """Do it wrong."""
        return KernelBlock.normalize(qkv_Bl3hc, temperature_h1, v_Bhlc, k_Bhlc)


def compare_norms(width: int, height: int, breadth: int, dtype: torch.dtype) -> None:
    """Fail unless the decoder's normalization and SiLU come out the same, and channels stay together."""
    norm = NormSilu(width).to(dtype)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x_BCHW = torch.randn(2, height, breadth, width).mul_(3).add_(torch.randn(width)).permute(0, 3, 1, 2).to(dtype)
    found = norm_silu(norm, x_BCHW)
    assert found.stride() == x_BCHW.stride()
    close(found, norm(x_BCHW), dtype)


with torch.inference_mode():
    for sizes in ((160, 5, 7), (640, 16, 16), (32, 96, 101), (320, 1, 1)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            compare_norms(*sizes, dtype)
        assert norm_kernel(CPU, torch.bfloat16) is norm_silu
    for heads in (1, 3):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            compare(heads, dtype)
    assert gpu_block(CPU, torch.bfloat16) is KernelBlock
    gpu_block.cache_clear()
    sys.modules["varcli.acceleration.triton_kernels"].KernelBlock = Swapped
    assert gpu_block(CPU, torch.bfloat16) is GpuBlock, "wrong kernels are not to be used"
