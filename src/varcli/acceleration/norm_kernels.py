"""Group normalization and SiLU of the decoder in one go, as Triton kernels: x is read twice, the result written once.

`models.layers.NormSilu` is the specification. Torch's operations read and write nearly twice as much, and before torch
2.15 three times, since they bring each map into another order and back.

Shapes: B images, C channels, H and W rows and columns.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

PARTS = 512
"""Into how many parts the positions of an image are divided, at most, so that a single one keeps a GPU busy."""
SMALLEST_PART = 64
"""Positions; fewer are not worth a program."""
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
    """One program an image and part of its positions: sums of each channel, and of its squares."""
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
    """One program an image and group: what each channel of the group is multiplied with, and what is added."""
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
    """One program some positions and an image: SiLU(x·factor + shift)."""
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
    """Return SiLU(norm(x)) of maps whose channels lie together (channels_last)."""
    images, width, height, breadth = x_BCHW.shape
    positions, size, block = height * breadth, width // norm.num_groups, triton.next_power_of_2(width)
    part = max(SMALLEST_PART, triton.next_power_of_2(triton.cdiv(positions, PARTS)))
    parts, at_once = triton.cdiv(positions, part), max(1, AT_ONCE // block)
    sums = torch.empty((images, parts, 2, width), device=x_BCHW.device)
    factors = torch.empty((images, 2, width), device=x_BCHW.device)
    out_BCHW = torch.empty_like(x_BCHW)
    with device_of(x_BCHW):
        _channel_sums[images, parts](
            x_BCHW, sums, positions, part, width, block, min(at_once, part), enable_fp_fusion=True
        )
        _group_factors[images, norm.num_groups](
            sums,
            norm.weight,
            norm.bias,
            factors,
            positions,
            parts,
            width,
            size,
            triton.next_power_of_2(size),
            triton.next_power_of_2(parts),
            enable_fp_fusion=True,
        )
        _silu[triton.cdiv(positions, at_once), images](
            x_BCHW, out_BCHW, factors, positions, width, block, at_once, enable_fp_fusion=True
        )
    return out_BCHW


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which a kernel starts where a tensor is; Triton takes the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
