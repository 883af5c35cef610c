"""Initial weights of a transformer, as the released models were started."""

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from varcli.models.transformer import Block, Transformer

HEAD_FACTOR = 0.02
ADA_FACTOR = 0.5


@torch.no_grad()
def initialize_transformer(model: Transformer, gamma: float) -> None:
    """Set all weights anew from torch's global generator.

    Args:
        model: the transformer.
        gamma: factor of the rows behind the gates γ1 and γ2.

    Source: released training recipe (SPEC of the checkpoints): truncated normals of standard deviation
    sqrt(1/(3 D)), what follows attention and feed-forward divided by sqrt(2 depth).
    """
    width, depth = model.config.width, model.config.depth
    std = math.sqrt(1 / (3 * width))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
    nn.init.trunc_normal_(model.pos_start, std=std)
    nn.init.trunc_normal_(model.pos_1LC, std=std)
    for block in cast("Iterable[Block]", model.blocks):
        block.attn.proj.weight.div_(math.sqrt(2 * depth))
        block.ffn.fc2.weight.div_(math.sqrt(2 * depth))
        if model.config.shared_adaln:
            block.ada_gss.normal_(std=width**-0.5)
            block.ada_gss[:, :, :2].mul_(gamma)
            block.ada_gss[:, :, 2:].mul_(ADA_FACTOR)
        else:
            _scale_modulation(block.ada_lin.linear, width, gamma)
    model.head_nm.ada_lin.linear.weight.mul_(ADA_FACTOR)
    model.head.weight.mul_(HEAD_FACTOR)


def _scale_modulation(linear: nn.Linear, width: int, gamma: float) -> None:
    linear.weight[: 2 * width].mul_(gamma)
    linear.weight[2 * width :].mul_(ADA_FACTOR)
