"""The two small models whose every number the original implementation has told us.

Their weights follow a rule instead of being stored; `fixtures/*.safetensors` holds what the original
computes with them.
"""

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from varcli.config import TokenizerConfig, TransformerConfig
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer

FIXTURES = Path(__file__).parents[1] / "fixtures"
NATURAL = ("ema_vocab_hit_SV", "zero_k_bias", "lvl_1L", "attn_bias_for_masking")


@dataclass(frozen=True)
class Reference:
    """A small model, its weights by the rule, and the original's outputs."""

    tokenizer: Tokenizer
    transformer: Transformer
    outputs: dict[str, Tensor]
    edits: list[dict]


def rule_weight(name: str, shape: torch.Size) -> Tensor:
    """Return the weight the reference's rule gives to a tensor of this name and shape."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
    n = torch.from_numpy(np.asarray(noise))
    last = name.rsplit(".", 1)[-1]
    if "scale_mul_1H11" in name:
        return math.log(4) + 0.1 * n
    if name in ("pos_1LC", "pos_start") or any(
        part in name for part in ("lvl_embed", "class_emb", "ada_gss", "quantize.embedding")
    ):
        return 0.5 * n
    if last in ("bias", "q_bias", "v_bias"):
        return 0.1 * n
    if n.ndim == 1:
        return 1 + 0.1 * n
    return n / math.sqrt(math.prod(shape[1:]))


def set_rule_weights(model: nn.Module) -> None:
    """Give every weight of a model the value of the rule; buffers keep theirs."""
    state = {
        name: tensor if name.rsplit(".", 1)[-1] in NATURAL else rule_weight(name, tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)


def load(name: str) -> Reference:
    """Return the reference model `mini` or `mini_shared`, in evaluation mode."""
    path = FIXTURES / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    given = json.loads(metadata["config"])
    sides = tuple(given["patch_nums"])
    tokenizer = Tokenizer(
        TokenizerConfig(sides=sides, codebook_size=given["V"], codebook_width=given["Cvae"], base_width=given["ch"])
    )
    transformer = Transformer(
        TransformerConfig(
            depth=given["depth"],
            width=64 * given["depth"],
            sides=sides,
            codebook_size=given["V"],
            codebook_width=given["Cvae"],
            class_count=given["num_classes"],
            shared_adaln=given["shared_aln"],
        )
    )
    set_rule_weights(tokenizer)
    set_rule_weights(transformer)
    return Reference(tokenizer.eval(), transformer.eval(), load_file(path), json.loads(metadata["edits"]))
