"""What a checkpoint file says about itself, and whether that is true."""

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from varcli.checkpoints.safetensors_io import file_sha256
from varcli.checkpoints.store import load_contents, load_model, load_tokenizer, read_metadata, recorded_hashes
from varcli.errors import CheckpointError


def describe(path: Path) -> dict[str, Any]:
    """Return the facts of a tokenizer or model file, reading no weights.

    Raises:
        CheckpointError: the file cannot be read, or is not one of ours.
    """
    metadata, tensors = read_metadata(path)
    facts: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size, "kind": metadata["kind"]}
    for part in ("tokenizer", "transformer"):
        if f"{part}_config" in metadata:
            sizes = [math.prod(shape) for name, (_, shape) in tensors.items() if name.startswith(f"{part}.")]
            facts[part] = _parsed(path, metadata, f"{part}_config") | {"values": sum(sizes)}
    if "classes" in metadata:
        facts["classes"] = len(_parsed(path, metadata, "classes"))
    facts["stored_as"] = sorted({kind for kind, _ in tensors.values()})
    facts["sha256"], facts["tokenizer_sha256"] = metadata.get("sha256"), metadata.get("tokenizer_sha256")
    facts["run"] = _parsed(path, metadata, "run")
    return facts


def verify(path: Path, registered: str | None = None) -> dict[str, str]:
    """Return the hashes of a file that is whole, finite and as it was written.

    Args:
        path: of a tokenizer or model file.
        registered: sha256 of the whole file, where the registry knows it.

    Raises:
        CheckpointError: it is not.
    """
    if registered and registered != file_sha256(path):
        raise CheckpointError(f"checkpoint: {path}; not the registered file, whose sha256 is {registered}")
    tensors, metadata = load_contents(path, ("tokenizer", "model"))
    hashes = recorded_hashes(tensors, metadata)
    recorded = metadata.get("tokenizer_sha256")
    if hashes["tokenizer_sha256"] != recorded:
        raise CheckpointError(f"checkpoint: {path}; the tokenizer in it is damaged or another one than {recorded}")
    if hashes["sha256"] != metadata.get("sha256"):
        raise CheckpointError(f"checkpoint: {path}; changed since it was written as {metadata.get('sha256')}")
    check_finite(path, tensors)
    load_model(path) if metadata["kind"] == "model" else load_tokenizer(path)
    return hashes


def check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError if a tensor has a value that is not finite."""
    for name, tensor in tensors.items():
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            raise CheckpointError(
                f"checkpoint: {path}; {wrong} values of {name} are not finite: train or convert again"
            )


def _parsed(path: Path, metadata: dict[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {path}; its metadata has no readable {key}") from error
