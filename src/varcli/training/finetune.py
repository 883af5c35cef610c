"""Fine-tuning a transformer: start from trained weights, train few of them, or make guidance unnecessary.

Shapes: B images, D channels, C classes, K scales, L tokens of all scales, s_k the side of a scale.
"""

import re
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from varcli.classes import ClassTable
from varcli.config import spans
from varcli.errors import InputError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.training.parallel import Rows

Sides = tuple[int, ...]

# --- a warm start ----------------------------------------------------------------------------------


@torch.no_grad()
def warm_start(model: Transformer, classes: ClassTable, trained: Transformer, known: ClassTable) -> int:
    """Give a model the weights of a trained one of the same shape, though it may have other classes or sides.

    Rows of classes that both know are kept, the others start at the mean of all known classes. Embeddings of
    positions and levels are interpolated to other sides.

    Args:
        model: gets the weights.
        classes: its classes.
        trained: has them.
        known: the classes of the trained one.

    Returns:
        The number of classes whose rows were kept.

    Raises:
        InputError: the models differ in more than classes and sides.
    """
    weights = trained.state_dict()
    ours, theirs = model.config, trained.config
    weights["pos_1LC"] = interpolated_positions(weights["pos_1LC"], theirs.sides, ours.sides)
    weights["lvl_embed.weight"] = interpolated_levels(weights["lvl_embed.weight"], len(ours.sides))
    weights["class_emb.weight"], kept = matching_rows(weights["class_emb.weight"], known, classes)
    # These follow from the sides alone.
    weights |= {name: tensor for name, tensor in model.named_buffers() if name in ("lvl_1L", "attn_bias_for_masking")}
    for name, tensor in model.state_dict().items():
        if name not in weights or weights[name].shape != tensor.shape:
            shape = tuple(weights[name].shape) if name in weights else "nothing"
            raise InputError(
                f"the weights of --init have another shape: {name} is {shape}, and {tuple(tensor.shape)} is "
                "needed; depth, width and the tokenizer's codebook must be the same"
            )
    model.load_state_dict(weights)
    return kept


@torch.no_grad()
def tokens_in_common(known: Tokenizer, other: Tokenizer) -> float:
    """Return the share of tokens that mean nearly the same to two tokenizers, 0 if their codebooks have other shapes.

    A row of the other codebook is nearest to the known row of the same number, unless the two were trained apart. A
    tokenizer that was fine-tuned has most tokens in common with what it was.
    """
    row_VC = other.quantize.embedding.weight
    if row_VC.shape != known.quantize.embedding.weight.shape:
        return 0.0
    nearest_V = known.quantize.nearest(row_VC[None])[0]
    return float((nearest_V == torch.arange(len(row_VC))).float().mean())


def matching_rows(weight_CD: Tensor, known: ClassTable, classes: ClassTable) -> tuple[Tensor, int]:
    """Return the class embedding for other classes, and how many rows were kept.

    Args:
        weight_CD: embedding of the known classes, with that of "no class" after them.
        known: the classes of its rows.
        classes: the classes wanted; one is known if its WordNet id (or folder's name) is.
    """
    row_of = {entry.wnid: row for row, entry in enumerate(known.entries)}
    mean_D = weight_CD[:-1].mean(0)
    rows = [row_of.get(entry.wnid) for entry in classes.entries]
    kept = sum(row is not None for row in rows)
    wanted = [mean_D if row is None else weight_CD[row] for row in rows]
    return torch.stack([*wanted, weight_CD[-1]]), kept


def interpolated_positions(pos_1LD: Tensor, sides: Sides, wanted: Sides) -> Tensor:
    """Return position embeddings (1, L', D) for other sides: each scale's from that of the same relative place."""
    parts = spans(sides)
    found = []
    for k, side in enumerate(wanted):
        # Scale k of K' lies where round(k (K - 1) / (K' - 1)) of K does.
        nearest = round(k * (len(sides) - 1) / max(len(wanted) - 1, 1))
        map_1Dss = pos_1LD[:, parts[nearest]].unflatten(1, (sides[nearest], sides[nearest])).permute(0, 3, 1, 2)
        if sides[nearest] != side:
            map_1Dss = F.interpolate(map_1Dss, size=(side, side), mode="bicubic", align_corners=False)
        found.append(map_1Dss.flatten(2).transpose(1, 2))
    return torch.cat(found, dim=1)


def interpolated_levels(level_KD: Tensor, count: int) -> Tensor:
    """Return level embeddings for another number of scales, linearly between the first and the last."""
    if len(level_KD) == count:
        return level_KD
    return F.interpolate(level_KD.T[None], size=count, mode="linear", align_corners=True)[0].T.contiguous()


# --- adapters --------------------------------------------------------------------------------------

ADAPTED = re.compile(r"(attn\.(mat_qkv|proj)|ffn\.fc[12]|ada_lin\.1)$")
"""Linear maps that LoRA adapts: attention, feed-forward and modulation."""
MODULATION = ("ada_lin.", "ada_gss", "class_emb.")
"""Weights of the modulation, with the class embedding that it is computed from."""


class LowRank(nn.Module):
    """W + (α / r) B A with α = 2 r (LoRA, Hu et al. 2021), equal to W at the start, when B is 0."""

    def __init__(self, weight_OI: Tensor, rank: int) -> None:
        super().__init__()
        out, inside = weight_OI.shape
        self.down_rI = nn.Parameter(torch.randn(rank, inside) / inside**0.5)
        self.up_Or = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight_OI: Tensor) -> Tensor:
        """Return the adapted weight."""
        return weight_OI + 2 * self.up_Or @ self.down_rI


def adapt(model: Transformer, adapter: str) -> None:
    """Train only an adapter's weights and the class embedding.

    Args:
        model: a plain transformer.
        adapter: "lora:RANK", "modulation", or "" for all weights.

    Source: arXiv 2507.11441 compares these two and full fine-tuning for VAR.
    """
    if not adapter:
        return
    model.requires_grad_(False)
    if adapter == "modulation":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in MODULATION))
        return
    rank = int(adapter.removeprefix("lora:"))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ADAPTED.search(name):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
    model.class_emb.weight.requires_grad_(True)


@torch.no_grad()
def merged(model: Transformer) -> Transformer:
    """Return the model with its adapters merged into ordinary weights; itself if it has none."""
    adapted = {name: module.weight for name, module in model.named_modules() if parametrize.is_parametrized(module)}
    if not adapted:
        return model
    # Torch's own removal would take the weights from the model that is trained as well, whose class the copy shares.
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." not in name}
    weights |= {f"{name}.weight": cast("Tensor", weight) for name, weight in adapted.items()}
    plain = Transformer(model.config)
    plain.load_state_dict(weights)
    return plain.to(model.head.weight.device).train(model.training)


# --- condition contrastive alignment ---------------------------------------------------------------


def other_labels(label_B: Tensor, classes: int, rows: Rows) -> Tensor:
    """Return for each label one of the other classes, drawn from torch's global generator for the whole batch."""
    shift_B = torch.randint(1, max(classes, 2), (rows.total,), device=label_B.device)
    return (label_B + rows.of(shift_B)) % classes


def contrastive_loss(
    own_BL: Tensor, other_BL: Tensor, own_before_BL: Tensor, other_before_BL: Tensor, weight: float, beta: float
) -> Tensor:
    """Return the mean loss of condition contrastive alignment (CCA), after which samples need no guidance.

    It is -log σ(r(x, c)) - λ log σ(-r(x, c')), where r = β log(p_θ(x|c) / p_φ(x|c)), φ are the weights before
    fine-tuning, and c' is another label.

    Args:
        own_BL: cross-entropy of each token under the image's label.
        other_BL: under another label.
        own_before_BL: under the image's label, by the weights before fine-tuning.
        other_before_BL: under the other label, by the weights before.
        weight: λ.
        beta: β.

    Source: arXiv 2410.09347, equation 12. Differs: divided by 1 + λ, which makes no difference to Adam; c' is drawn
    uniformly from all other classes, where the paper shuffles the labels of a batch.
    """
    own_B = beta * (own_before_BL - own_BL).sum(1)
    other_B = beta * (other_before_BL - other_BL).sum(1)
    return (F.softplus(-own_B) + weight * F.softplus(other_B)).mean() / (1 + weight)
