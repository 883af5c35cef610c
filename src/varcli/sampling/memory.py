"""How much of a GPU's memory a batch takes, and so how large batches may be.

Counted is what the loop allocates; what libraries need for themselves comes on top.
"""

from typing import Any

import torch

from varcli.config import SampleConfig
from varcli.models.fused_gpu import for_gpu
from varcli.models.quantized import Int8Linear
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.devices import block_weight
from varcli.sampling.sampler import DECODED_AT_ONCE

LARGEST_BATCH = 256
"""Beyond it nothing gets faster."""

PLANNED = 0.85
"""The part of the memory that models and batches may fill; the rest is for libraries and for what lies in pieces."""


def fitting_batch(tokenizer: Tokenizer, transformer: Transformer, config: SampleConfig) -> int:
    """Return how many pictures should fit into a GPU's memory, a power of two; too many are halved later.

    It is the whole memory, not what others leave free of it: in 16 bits the pictures depend on the size of their
    batch, and are to be the same each time on the same machine.
    """
    device = block_weight(transformer).device
    if device.type != "cuda":
        return 16
    _, whole = torch.cuda.mem_get_info(device)
    room, count = PLANNED * whole - model_bytes(tokenizer, transformer), LARGEST_BATCH
    while count > 1 and batch_bytes(tokenizer, transformer, config, count) > room:
        count //= 2
    return count


def model_bytes(tokenizer: Tokenizer, transformer: Transformer) -> int:
    """Return what the models themselves take."""
    tensors = [tensor for model in (tokenizer, transformer) for tensor in (*model.parameters(), *model.buffers())]
    return sum(tensor.nbytes for tensor in tensors)


def batch_bytes(tokenizer: Tokenizer, transformer: Transformer, config: SampleConfig, count: int) -> int:
    """Return what a batch of pictures takes at most at one time, recorded, besides the models."""
    shape, size = transformer.config, block_weight(transformer).element_size()
    rows, last = 2 * count if config.cfg > 0 else count, shape.sides[-1] ** 2
    fused = for_gpu(transformer)
    kept_tokens = shape.depth * (shape.length - last) + shape.length if fused else shape.depth * shape.length
    cache = 2 * rows * kept_tokens * shape.width * size
    modulations = rows * shape.depth * 6 * shape.width * (4 + size)
    logits = count * shape.length * shape.codebook_size * 4
    return (
        cache
        + modulations
        + logits
        + max(
            rows * last * shape.width * _block_bytes(transformer),
            count * last * (config.top_k or shape.codebook_size) * 40,  # a draw
            min(count, DECODED_AT_ONCE) * _decoder_bytes(tokenizer),
        )
    )


def _block_bytes(transformer: Transformer) -> int:
    """Return what a block takes at most for one feature of one token, the residual stream included, in 16 bits."""
    block: Any = transformer.blocks[0]
    if isinstance(block.ffn.fc1, Int8Linear):
        return 58  # four times the width in float32 again and again: magnitudes, quotients, products
    return 2 * 4 + 5 * 2 if for_gpu(transformer) else 30


def _decoder_bytes(tokenizer: Tokenizer) -> int:
    """Return what a picture takes in the decoder where that is most, with the input and output of a few layers."""
    shape, size = tokenizer.config, tokenizer.post_quant_conv.weight.element_size()
    return 5 * max(shape.multipliers[:2]) * shape.base_width * shape.pixels**2 * size
