"""Checkpoints as single safetensors files: written atomically, read strictly, never unpickled.

A file holds tensors `tokenizer.NAME` and `transformer.NAME`, the names being those of the released
checkpoints, and metadata that says everything else: kind, configurations, class table, facts of the
training run, and hashes. Loading builds the modules from it without initializing any weight.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from varcli.checkpoints.registry import cache_folder, registry
from varcli.checkpoints.safetensors_io import (
    checkpoint_sha256,
    load_header,
    load_tensors,
    reason,
    save_tensors,
    tensors_sha256,
)
from varcli.classes import ClassTable
from varcli.config import TokenizerConfig, TransformerConfig, from_json, to_json
from varcli.errors import CheckpointError
from varcli.files import parse_json
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer

FORMAT_VERSION = "1"
DERIVED = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias")
"""Buffers that follow from the configuration: not stored, but computed."""
HASHED = ("kind", "tokenizer_config", "transformer_config", "classes")
"""Metadata that determines images, as the weights do."""

Config = TypeVar("Config", TokenizerConfig, TransformerConfig)
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model ready to sample from, in evaluation mode."""

    tokenizer: Tokenizer
    transformer: Transformer
    classes: ClassTable
    sha256: str
    """Over weights, configurations and class table, as recorded in the file."""
    run: dict[str, Any]
    """Facts of the training run."""
    path: Path


def read_metadata(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
    """Return the metadata of a file of ours, and the type and shape of each tensor, reading no weights.

    Raises:
        CheckpointError: the file is missing, truncated or not one of ours.
    """
    tensors, metadata = load_header(path)
    _check_kind(path, metadata, ("tokenizer", "model"))
    return metadata, tensors


def save_tokenizer(path: Path, tokenizer: Tokenizer, run: dict[str, Any]) -> None:
    """Write a tokenizer with its configuration, floats stored as float32."""
    tensors = _stored("tokenizer", tokenizer, torch.float32)
    _save(path, tensors, {"kind": "tokenizer", "tokenizer_config": to_json(tokenizer.config), "run": _facts(run)})


def save_model(
    path: Path,
    tokenizer: Tokenizer,
    transformer: Transformer,
    classes: ClassTable,
    run: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write transformer and tokenizer with configurations and class table, floats stored as `dtype`.

    Raises:
        CheckpointError: the tokenizer cannot be this transformer's, or the class table has other rows.
    """
    check_together(tokenizer.config, transformer.config)
    _check_classes(classes, transformer.config)
    tensors = _stored("tokenizer", tokenizer, dtype) | _stored("transformer", transformer, dtype)
    metadata = {
        "kind": "model",
        "tokenizer_config": to_json(tokenizer.config),
        "transformer_config": to_json(transformer.config),
        "classes": classes.to_json(),
        "run": _facts(run),
    }
    _save(path, tensors, metadata)


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer file or a model file, in evaluation mode.

    Raises:
        CheckpointError: the file cannot be read, or does not hold exactly what its configuration says.
    """
    tensors, metadata = load_contents(path, ("tokenizer", "model"))
    return _tokenizer(path, tensors, metadata)


def load_model(path: Path) -> Checkpoint:
    """Return a checkpoint on the CPU, floats as float32 however they are stored.

    Raises:
        CheckpointError: the file cannot be read, or does not hold exactly what its configuration says.
    """
    path = Path(path)
    tensors, metadata = load_contents(path, ("model",))
    config = read_config(path, metadata, TransformerConfig, "transformer_config")
    with _parsing(path):
        classes = ClassTable.from_json(metadata["classes"])
        sha256 = metadata["sha256"]
    tokenizer = _tokenizer(path, tensors, metadata)
    transformer = build(path, Transformer, config, _part(tensors, "transformer."))
    check_together(tokenizer.config, config)
    _check_classes(classes, config)
    return Checkpoint(tokenizer, transformer, classes, sha256, run_facts(path, metadata), path)


def check_together(tokenizer: TokenizerConfig, transformer: TransformerConfig) -> None:
    """Raise CheckpointError unless the tokenizer's codebook and sides are the transformer's."""
    for name in ("sides", "codebook_size", "codebook_width"):
        theirs, ours = getattr(tokenizer, name), getattr(transformer, name)
        if theirs != ours:
            what = f"the tokenizer belongs to another transformer: its {name.replace('_', ' ')} is {_words(theirs)}"
            raise CheckpointError(f"{what}, and the transformer's {_words(ours)}")


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Return the hash that identifies a tokenizer: over names, shapes and bytes of its tensors in float32."""
    return tensors_sha256(_stored("tokenizer", tokenizer, torch.float32))


def recorded_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes that a file with these contents records: `sha256` and `tokenizer_sha256`."""
    digest = hashlib.sha256(tensors_sha256(tensors).encode())
    for key in HASHED:
        digest.update(f"\n{key} {metadata.get(key, '')}".encode())
    tokenizer = {name: tensor.float() for name, tensor in tensors.items() if name.startswith("tokenizer.")}
    return {"sha256": digest.hexdigest(), "tokenizer_sha256": tensors_sha256(tokenizer)}


def load_contents(path: Path, kinds: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a file of ours that holds one of these kinds.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    tensors, metadata = load_tensors(path)
    _check_kind(path, metadata, kinds)
    for name in sorted(tensors):
        if not name.startswith(("tokenizer.", "transformer.")[: 1 + (metadata["kind"] == "model")]):
            raise CheckpointError(f"the checkpoint {path} has an unexpected tensor {name}")
    return tensors, metadata


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    metadata = {"varcli": FORMAT_VERSION} | metadata | recorded_hashes(tensors, metadata)
    save_tensors(path, tensors, metadata)


def _stored(prefix: str, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in module.state_dict().items() if name.rpartition(".")[2] not in DERIVED}
    return {f"{prefix}.{name}": t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _facts(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


def _tokenizer(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Tokenizer:
    config = read_config(path, metadata, TokenizerConfig, "tokenizer_config")
    return build(path, Tokenizer, config, _part(tensors, "tokenizer."))


@contextlib.contextmanager
def without_initialization() -> Iterator[None]:
    """Make torch's layers skip drawing initial weights, which loading would only throw away.

    Measured: 12 ms for a model of 14 M parameters against 86 with initialization; the meta device
    imports so much on its first use that it takes a second.
    """
    layers: tuple[Any, ...] = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.GroupNorm)
    kept = [layer.reset_parameters for layer in layers]
    for layer in layers:
        layer.reset_parameters = lambda self: None
    try:
        yield
    finally:
        for layer, method in zip(layers, kept, strict=True):
            layer.reset_parameters = method


def build(source: Path, module: type[Module], config: Any, state: Mapping[str, Tensor]) -> Module:
    """Return the module of a configuration, in evaluation mode, with these tensors as its weights.

    Floats become float32; float32 tensors are not copied.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or type, or has values that are not finite.
    """
    try:
        with without_initialization():
            built = module(config)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        raise CheckpointError(f"the checkpoint {source} is of a model that does not fit into memory") from error
    check_state(source, built, state)
    floats = {name: tensor.float() for name, tensor in state.items()}
    check_finite(source, {f"{module.__name__.lower()}.{name}": tensor for name, tensor in floats.items()})
    built.load_state_dict(floats, strict=False, assign=True)
    return built.eval()


def check_state(source: Path, module: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `given` has exactly the module's tensors, as floats of their shapes."""
    wanted = {name: t.shape for name, t in module.state_dict().items() if name.rpartition(".")[2] not in DERIVED}
    for name in sorted(wanted.keys() | given.keys()):
        if name not in given:
            raise CheckpointError(f"the checkpoint {source} has no tensor {name}")
        if name not in wanted:
            raise CheckpointError(f"the checkpoint {source} has an unexpected tensor {name}")
        if given[name].shape != wanted[name]:
            shapes = f"{_words(tuple(given[name].shape)) or 'one number'} instead of {_words(tuple(wanted[name]))}"
            raise CheckpointError(f"the checkpoint {source} has a tensor {name} of {shapes}")
        tensor = given[name]
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            words = "without values" if tensor.is_meta else f"of {str(kind).removeprefix('torch.')}"
            raise CheckpointError(
                f"the checkpoint {source} has a tensor {name} {words}: floating-point numbers are needed"
            )


def read_config(path: Path, metadata: Mapping[str, str], kind: type[Config], key: str) -> Config:
    """A configuration in a checkpoint's metadata.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    with _parsing(path):
        return from_json(kind, metadata[key])


def run_facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Facts of the training run in a checkpoint's metadata.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    with _parsing(path):
        return dict(parse_json(metadata["run"]))


def _check_kind(path: Path, metadata: Mapping[str, str], kinds: tuple[str, ...]) -> None:
    if "identity" in metadata and "step" in metadata:
        there = "model.safetensors or tokenizer.safetensors"
        raise CheckpointError(f"the checkpoint {path} is the state of a training run; the model is beside it: {there}")
    if "varcli" not in metadata:
        raise CheckpointError(f"the checkpoint {path} was not written by varcli: see var checkpoints convert")
    if metadata["varcli"] != FORMAT_VERSION:
        raise CheckpointError(f"the checkpoint {path} has format {metadata['varcli']}, which needs a newer varcli")
    if metadata.get("kind") not in kinds:
        raise CheckpointError(f"the checkpoint {path} holds a {metadata.get('kind')}, and a {kinds[-1]} is needed")


def _check_classes(classes: ClassTable, config: TransformerConfig) -> None:
    if len(classes.entries) != config.class_count:
        raise CheckpointError(
            f"the class table has {len(classes.entries)} classes, and the transformer {config.class_count}"
        )


@contextlib.contextmanager
def _parsing(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the metadata of the checkpoint {path} cannot be used: {reason(error)}") from error


def _words(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# --- verification ----------------------------------------------------------------------------------


def describe(path: Path) -> dict[str, Any]:
    """Return the facts of a tokenizer or model file, reading no weights.

    Raises:
        CheckpointError: the file cannot be read, or is not one of ours.
    """
    metadata, tensors = read_metadata(path)
    facts: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size, "kind": metadata["kind"]}
    with _parsing(path):
        for part in ("tokenizer", "transformer"):
            if f"{part}_config" in metadata:
                sizes = [math.prod(shape) for name, (_, shape) in tensors.items() if name.startswith(f"{part}.")]
                facts[part] = dict(parse_json(metadata[f"{part}_config"])) | {"values": sum(sizes)}
        if "classes" in metadata:
            facts["classes"] = len(ClassTable.from_json(metadata["classes"]))
    facts["stored_as"] = sorted({kind for kind, _ in tensors.values()})
    facts["sha256"], facts["tokenizer_sha256"] = metadata.get("sha256"), metadata.get("tokenizer_sha256")
    facts["run"] = run_facts(path, metadata)
    return facts


def verify(path: Path, registered: str | None = None) -> dict[str, str]:
    """Verify that a file is whole, finite and unchanged; return its hashes.

    Args:
        path: of a tokenizer or model file.
        registered: sha256 of the whole file, where the registry knows it.

    Raises:
        CheckpointError: it is not.
    """
    if registered and registered != checkpoint_sha256(path):
        raise CheckpointError(f"the checkpoint {path} is not the registered file, whose sha256 is {registered}")
    tensors, metadata = load_contents(path, ("tokenizer", "model"))
    hashes = recorded_hashes(tensors, metadata)
    recorded = metadata.get("tokenizer_sha256")
    if hashes["tokenizer_sha256"] != recorded:
        raise CheckpointError(f"the checkpoint {path} has a damaged tokenizer, or another one than {recorded}")
    if hashes["sha256"] != metadata.get("sha256"):
        raise CheckpointError(f"the checkpoint {path} was changed since it was written as {metadata.get('sha256')}")
    check_finite(path, tensors)
    load_model(path) if metadata["kind"] == "model" else load_tokenizer(path)
    return hashes


def check_registered(checkpoint: str, path: Path, metadata: Mapping[str, str]) -> None:
    """Raise CheckpointError if the file under the name of a released checkpoint holds another model."""
    entry = registry().get(checkpoint)
    if entry is None or entry.bundled:
        return
    from varcli.downloads import recorded

    if metadata["kind"] != "model":
        raise CheckpointError(f"the checkpoint {path} holds a {metadata['kind']} instead of {checkpoint}")
    config = read_config(path, metadata, TransformerConfig, "transformer_config")
    if (config.depth, config.class_count) != (entry.depth or config.depth, entry.classes):
        found = f"depth {config.depth} and {config.class_count} classes"
        raise CheckpointError(f"the checkpoint {path} is another model than {checkpoint}: {found}")
    expected = recorded(cache_folder()).get(path.name)
    if expected not in (None, metadata.get("sha256")):
        raise CheckpointError(f"the checkpoint {path} is another model than the one downloaded as {checkpoint}")


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a tensor has a value that is not finite."""
    for name, tensor in tensors.items():
        if math.isfinite(float(tensor.sum())):
            continue  # one such value would make the sum not finite, and a sum is fast
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            raise CheckpointError(
                f"the checkpoint {path} has {wrong} values in {name} that are not finite: train or convert again"
            )
