"""A model file small enough to sample from in a test: 16 × 16 pixels, five of ImageNet's classes."""

import torch

from support import reference
from varcli.checkpoints.store import save_model
from varcli.classes import ClassTable, imagenet
from varcli.config import TokenizerConfig, TransformerConfig
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer

SIDES = (1, 2, 4)
CLASSES = (1, 207, 281, 963, 985)  # goldfish, golden retriever, tabby, pizza, daisy


def save(path, depth=2):
    """Write the model; return its path. One of another depth has the same tokenizer and classes."""
    tokenizer = Tokenizer(
        TokenizerConfig(sides=SIDES, codebook_size=64, codebook_width=8, base_width=32, multipliers=(1, 1, 1))
    )
    transformer = Transformer(
        TransformerConfig(depth=depth, width=64, sides=SIDES, codebook_size=64, codebook_width=8, class_count=5)
    )
    reference.set_rule_weights(tokenizer)
    reference.set_rule_weights(transformer)
    with torch.no_grad():
        transformer.head.weight.mul_(3)  # logits far enough apart for guidance and filters to matter
    save_model(path, tokenizer, transformer, ClassTable(tuple(map(imagenet().by_id, CLASSES))), {"made": "by a rule"})
    return path
