"""Triton kernels for the work between matrix products, each of which reads and writes everything once.

Torch's operations are the specification: `cuda_blocks.residual_norm`, `cuda_blocks.normalized` and `NormSilu`.

Shapes: B rows of the batch, l tokens of this call, L tokens of all scales so far, D width, h heads of c = 64 channels.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from varcli.acceleration.cuda_blocks import GpuBlock


@triton.jit(do_not_specialize=["length"])  # one for all scales
def _residual_norm(
    x: tl.tensor,
    out: tl.tensor,
    h: tl.tensor,
    gamma: tl.tensor,
    factor: tl.tensor,
    shift: tl.tensor,
    length: int,
    vector_stride: int,
    width: tl.constexpr,
    block: tl.constexpr,
    adds: tl.constexpr,
) -> None:
    """One program per token: x += h·γ where it `adds`, out = LN(x)·factor + shift."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    vector = token // length * vector_stride + column
    place = token * width + column
    value = tl.load(x + place, mask=inside, other=0.0)
    multiplied = tl.load(factor + vector, mask=inside, other=0.0)  # loaded before the sums are waited for
    moved = tl.load(shift + vector, mask=inside, other=0.0)
    if adds:
        added = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
        value += added * tl.load(gamma + vector, mask=inside, other=0.0)
        tl.store(x + place, value, mask=inside)
    centred = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
    normal = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + 1e-6)
    tl.store(out + place, (normal * multiplied + moved).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def _normalize(
    qkv: tl.tensor,
    temperature: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    length: int,
    row_stride: int,
    head_stride: int,
    heads: tl.constexpr,
    block: tl.constexpr,
    channels: tl.constexpr,
) -> None:
    """One program per token: unit queries times their temperature stay, unit keys and the values go into the cache."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, block)[:, None]
    channel = tl.arange(0, channels)[None, :]
    inside = (head < heads) & (channel < channels)
    at = token * (3 * heads * channels) + head * channels + channel
    q = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(qkv + at + heads * channels, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(qkv + at + 2 * heads * channels, mask=inside, other=0.0)
    q_length = tl.maximum(tl.sqrt(tl.sum(q * q, axis=1)), 1e-12)[:, None]
    k_length = tl.maximum(tl.sqrt(tl.sum(k * k, axis=1)), 1e-12)[:, None]
    q *= tl.load(temperature + head, mask=head < heads, other=0.0) / q_length
    tl.store(qkv + at, q.to(qkv.dtype.element_ty), mask=inside)
    to = token // length * row_stride + head * head_stride + token % length * channels + channel
    tl.store(keys + to, (k / k_length).to(keys.dtype.element_ty), mask=inside)
    tl.store(values + to, v, mask=inside)


def residual_norm(
    x_BlD: Tensor, branch: tuple[Tensor, Tensor] | None, factor_B1D: Tensor, shift_B1D: Tensor, dtype: torch.dtype
) -> Tensor:
    """Do what `cuda_blocks.residual_norm` does: change x in place and return (B, l, D)."""
    assert x_BlD.is_contiguous(), "kernels count tokens one after the other"
    rows, length, width = x_BlD.shape
    out_BlD = torch.empty_like(x_BlD, dtype=dtype)
    h_BlD, gamma_B1D = branch or (out_BlD, factor_B1D)  # without a branch the kernel looks at neither
    assert h_BlD.is_contiguous()
    with device_of(x_BlD):
        _residual_norm[(rows * length,)](
            x_BlD,
            out_BlD,
            h_BlD,
            gamma_B1D,
            factor_B1D,
            shift_B1D,
            length,
            factor_B1D.stride(0),
            width,
            triton.next_power_of_2(width),
            branch is not None,
            enable_fp_fusion=True,
        )
    return out_BlD


def normalized(qkv_Bl3hc: Tensor, temperature_h1: Tensor, k_Bhlc: Tensor, v_Bhlc: Tensor) -> Tensor:
    """Do what `cuda_blocks.normalized` does: return queries (B, h, l, c), and store keys and values."""
    assert qkv_Bl3hc.is_contiguous(), "kernels count tokens one after the other"
    rows, length, _, heads, channels = qkv_Bl3hc.shape
    assert k_Bhlc.stride() == v_Bhlc.stride() and k_Bhlc.stride()[2:] == (channels, 1), "of one cache"
    with device_of(qkv_Bl3hc):
        _normalize[(rows * length,)](
            qkv_Bl3hc,
            temperature_h1,
            k_Bhlc,
            v_Bhlc,
            length,
            k_Bhlc.stride(0),
            k_Bhlc.stride(1),
            heads,
            triton.next_power_of_2(heads),
            channels,
            enable_fp_fusion=True,
        )
    return qkv_Bl3hc[:, :, 0].transpose(1, 2)


class KernelBlock(GpuBlock):
    """One block's two branches, with these kernels between their products."""

    residual_norm = staticmethod(residual_norm)
    normalize = staticmethod(normalized)


# --- normalization with SiLU -----------------------------------------------------------------------


PARTS = 512
"""Most parts that the positions of an image are divided into, so that a single image keeps a GPU busy."""
SMALLEST_PART = 64
"""Least number of positions per program."""
AT_ONCE = 4096
"""Values that a program holds at a time."""


@triton.jit(do_not_specialize=["positions"])
def _channel_sums(
    x: tl.tensor,
    sums: tl.tensor,
    positions: int,
    part: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    at_once: tl.constexpr,
) -> None:
    """One program per image and part of its positions: sums of each channel, and of its squares."""
    image, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, block)[None, :]
    total = tl.zeros([at_once, block], dtype=tl.float32)
    squares = tl.zeros([at_once, block], dtype=tl.float32)
    for first in range(0, part, at_once):
        position = number * part + first + tl.arange(0, at_once)[:, None]
        inside = (position < positions) & (channel < width)
        value = tl.load(x + (image * positions + position) * width + channel, mask=inside, other=0.0).to(tl.float32)
        total += value
        squares += value * value
    channel = tl.arange(0, block)
    to = sums + (image * tl.num_programs(1) + number) * 2 * width + channel
    tl.store(to, tl.sum(total, axis=0), mask=channel < width)
    tl.store(to + width, tl.sum(squares, axis=0), mask=channel < width)


@triton.jit(do_not_specialize=["positions", "parts"])
def _group_factors(
    sums: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    factors: tl.tensor,
    positions: int,
    parts: int,
    width: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
    parts_block: tl.constexpr,
) -> None:
    """One program per image and group: factor and shift of each channel of the group."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member = tl.arange(0, block)[None, :]
    part = tl.arange(0, parts_block)[:, None]
    inside = (member < size) & (part < parts)
    at = sums + (image * parts + part) * 2 * width + group * size + member
    count = positions * size
    mean = tl.sum(tl.load(at, mask=inside, other=0.0)) / count
    variance = tl.sum(tl.load(at + width, mask=inside, other=0.0)) / count - mean * mean
    channel = tl.arange(0, block)
    inside = channel < size
    factor = tl.load(weight + group * size + channel, mask=inside, other=0.0).to(tl.float32)
    factor *= tl.rsqrt(tl.maximum(variance, 0.0) + 1e-6)
    shift = tl.load(bias + group * size + channel, mask=inside, other=0.0).to(tl.float32) - mean * factor
    to = factors + image * 2 * width + group * size + channel
    tl.store(to, factor, mask=inside)
    tl.store(to + width, shift, mask=inside)


@triton.jit(do_not_specialize=["positions"])
def _silu(
    x: tl.tensor,
    out: tl.tensor,
    factors: tl.tensor,
    positions: int,
    width: tl.constexpr,
    block: tl.constexpr,
    at_once: tl.constexpr,
) -> None:
    """One program per image and part of its positions: SiLU(x·factor + shift)."""
    image = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, block)[None, :]
    position = tl.program_id(0) * at_once + tl.arange(0, at_once)[:, None]
    inside = (position < positions) & (channel < width)
    place = (image * positions + position) * width + channel
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(factors + image * 2 * width + channel, mask=channel < width, other=0.0)
    value += tl.load(factors + image * 2 * width + width + channel, mask=channel < width, other=0.0)
    tl.store(out + place, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=inside)


def norm_silu(norm: nn.GroupNorm, x_BCHW: Tensor) -> Tensor:
    """Return SiLU(norm(x)) of maps in channels_last."""
    images, channels, height, width = x_BCHW.shape
    positions, size, block = height * width, channels // norm.num_groups, triton.next_power_of_2(channels)
    part = max(SMALLEST_PART, triton.next_power_of_2(triton.cdiv(positions, PARTS)))
    parts, at_once = triton.cdiv(positions, part), max(1, AT_ONCE // block)
    sums = torch.empty((images, parts, 2, channels), device=x_BCHW.device)
    factors = torch.empty((images, 2, channels), device=x_BCHW.device)
    out_BCHW = torch.empty_like(x_BCHW)
    with device_of(x_BCHW):
        _channel_sums[images, parts](
            x_BCHW, sums, positions, part, channels, block, min(at_once, part), enable_fp_fusion=True
        )
        _group_factors[images, norm.num_groups](
            sums,
            norm.weight,
            norm.bias,
            factors,
            positions,
            parts,
            channels,
            size,
            triton.next_power_of_2(size),
            triton.next_power_of_2(parts),
            enable_fp_fusion=True,
        )
        _silu[triton.cdiv(positions, at_once), images](
            x_BCHW, out_BCHW, factors, positions, channels, block, at_once, enable_fp_fusion=True
        )
    return out_BCHW


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which a kernel starts where a tensor is; Triton takes the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
