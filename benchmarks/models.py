"""The models that a benchmark measures."""

from varcli.checkpoints.random_init import Models, random_models
from varcli.checkpoints.registry import resolve_checkpoint
from varcli.checkpoints.store import load_model


def named_models(checkpoint: str | None) -> tuple[str, Models]:
    """Return what to call the models in a table, and both of a checkpoint or, without one, of the d16's shape."""
    if checkpoint is None:
        return "d16 at 256 px", random_models("var-d16")
    found = load_model(resolve_checkpoint(checkpoint))
    return checkpoint, (found.tokenizer, found.transformer)
