"""Safetensors files: written whole or not at all, read strictly, hashed by content. No pickle anywhere."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from varcli import files
from varcli.errors import CheckpointError, RunError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a checkpoint; give it the final name once the block ends well, else leave nothing.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    try:
        with files.replacing(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be written: {reason(error)}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(Path(path)) as part:
        save_file(plain, part, dict(metadata))
        _sort_metadata(part)


def _sort_metadata(path: Path) -> None:
    """Put a file's metadata in order of its keys: the library writes them in any, and equal runs give equal files."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, mapped from the file, and the metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or of another format.
    """
    with reading(path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata


def load_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Return type and shape of each tensor, and the metadata, reading no weights.

    Raises:
        CheckpointError: the file is missing, truncated or of another format.
    """
    with reading(path), safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
        tensors = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        return tensors, file.metadata() or {}


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256, in hexadecimal, over names, types, shapes and bytes of tensors, in any order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256, in hexadecimal, of a file's bytes.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with reading(path):
        return files.file_sha256(path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint file is read into CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return in one line what an operating system or format error says, without the path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
