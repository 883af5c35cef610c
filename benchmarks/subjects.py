"""Which models a benchmark measures."""

from varcli.checkpoints.registry import find
from varcli.checkpoints.store import load_model
from varcli.checkpoints.untrained import Models, untrained


def named_models(checkpoint: str | None) -> tuple[str, Models]:
    """Return what to call the models in a table, and both of a checkpoint or, without one, of the d16's shape."""
    if checkpoint is None:
        return "d16 at 256 px", untrained("var-d16")
    found = load_model(find(checkpoint))
    return checkpoint, (found.tokenizer, found.transformer)
