"""`var classes`: which classes there are, and which a checkpoint knows."""

import json

from varcli.checkpoints.registry import local_checkpoint, registry
from varcli.classes import ClassTable, imagenet
from varcli.commands import options
from varcli.console import result, table
from varcli.errors import CheckpointError, InputError


def classes(
    words: options.Words = None,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    as_json: options.Json = False,
) -> None:
    """Search class names and say which of them a checkpoint knows; without words list those it knows."""
    known = _known(checkpoint)
    wanted = " ".join(words or [])
    found = _all_around(known).search(wanted) if wanted else known.entries
    if not found:
        raise InputError(f"no class name has the words {wanted}: try fewer or shorter words")
    if as_json:
        for entry in found:
            facts = {"id": entry.id, "wnid": entry.wnid, "names": entry.names, "known": entry.id in known}
            result(json.dumps(facts))
        return
    rows = [(str(e.id), e.wnid, "yes" if e.id in known else "no", ", ".join(e.names)) for e in found]
    table(("class", "folder", f"known to {checkpoint}", "names"), rows)


def _all_around(known: ClassTable) -> ClassTable:
    """Return ImageNet's classes if the known ones are among them, else the known ones."""
    part = {entry.wnid for entry in known.entries} <= {entry.wnid for entry in imagenet().entries}
    return imagenet() if part else known


def _known(checkpoint: str) -> ClassTable:
    """Return the classes that a checkpoint knows; a released one need not be downloaded for that."""
    entry = registry().get(checkpoint)
    if entry and entry.classes == len(imagenet()):
        return imagenet()
    from varcli.checkpoints.store import read_metadata

    path = local_checkpoint(checkpoint)
    metadata, _ = read_metadata(path)
    if "classes" not in metadata:
        raise CheckpointError(f"{path} is a tokenizer and has no classes: a model is needed")
    return ClassTable.from_json(metadata["classes"])
