"""Merging two models: the weights of one, extrapolated away from those of another (Neon, arXiv 2510.03597)."""

from pathlib import Path

import torch

from varcli.checkpoints.store import load_model, save_model, tokenizer_sha256
from varcli.errors import CheckpointError, UsageError
from varcli.files import check_not_read, check_writable


@torch.no_grad()
def merge(reference: Path, tuned: Path, weight: float, out: Path) -> None:
    """Write the model of the weights (1 + w) θ_reference - w θ_tuned.

    Args:
        reference: a model file.
        tuned: the same model, fine-tuned: for Neon on its own samples.
        weight: w; above 0 extrapolates away from the tuned model, from -1 to 0 interpolates.
        out: the .safetensors file to write.

    Raises:
        UsageError: the output is one of the inputs, or the weights are not finite.
        CheckpointError: the models differ in shape, classes or tokenizer.
    """
    check_not_read("out", out, (reference, tuned))
    check_writable(out)
    first, second = load_model(reference), load_model(tuned)
    for what, same in {
        "another shape": first.transformer.config == second.transformer.config,
        "other classes": first.classes == second.classes,
        "another tokenizer": tokenizer_sha256(first.tokenizer) == tokenizer_sha256(second.tokenizer),
    }.items():
        if not same:
            raise CheckpointError(
                f"{tuned} has {what} than {reference}: merge a model with one that was fine-tuned from it"
            )
    for ours, theirs in zip(first.transformer.parameters(), second.transformer.parameters(), strict=True):
        ours.copy_((1 + weight) * ours - weight * theirs)
        if not ours.isfinite().all():
            raise UsageError(f"--weight must give finite weights (got {weight:g})")
    facts = {"merged": f"(1 + w) {first.sha256[:12]} - w {second.sha256[:12]}", "w": weight}
    save_model(out, first.tokenizer, first.transformer, first.classes, facts)
