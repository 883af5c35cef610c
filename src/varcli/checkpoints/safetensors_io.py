"""Safetensors files: written whole or not at all, read strictly, hashed by content. No pickle anywhere."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from varcli import files
from varcli.errors import CheckpointError, RunError
from varcli.files import parse_json


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
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
    with writing(Path(path)) as part:
        save_file(plain, part, dict(metadata))
        _sort_metadata(part)


def _sort_metadata(path: Path) -> None:
    """Sort a file's metadata by its keys, so that equal runs give equal files: the library writes them in any order."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    The tensors are in memory of their own, so that later changes of the file have no effect.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or was changed while it was read.
    """
    with reading(path), Path(path).open("rb") as file:
        opened = files.file_state(file.fileno())
        header, metadata = _header(file)
        tensors = {}
        for name, entry in header.items():
            if entry.kind not in DTYPES:
                raise SafetensorError(f"tensor {name} is of type {entry.kind}")
            tensors[name] = torch.empty(entry.shape, dtype=DTYPES[entry.kind])
            content = tensors[name].view(-1).view(torch.uint8).numpy()
            if file.readinto(content.data) != content.nbytes:
                raise SafetensorError("it is truncated")
        if files.file_state(file.fileno()) != opened:
            raise SafetensorError("it was changed while it was read")
        return tensors, metadata


def load_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Return type and shape of each tensor, and the metadata, reading no weights.

    Raises:
        CheckpointError: the file is missing, truncated or of another format.
    """
    with reading(path), Path(path).open("rb") as file:
        header, metadata = _header(file)
        return {name: (entry.kind, entry.shape) for name, entry in header.items()}, metadata


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of a safetensors file that are read, by their names there."""


LONGEST_HEADER = 100_000_000
"""Bytes, as the format's own library has it."""


class _Entry(NamedTuple):
    """A tensor's entry in a header; `start` and `end` are in bytes after the header."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


def _header(file: BinaryIO) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Read a file's header: the entries of its tensors in the order of their bytes, where the file is then positioned.

    Raises:
        SafetensorError: it is no header, or not that of this file.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, LONGEST_HEADER):
        raise SafetensorError("it is no safetensors file, or truncated")
    try:
        header = parse_json(file.read(length))
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(**about) for name, about in header.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError
    except (AttributeError, TypeError, ValueError) as error:
        raise SafetensorError("it has no safetensors header") from error
    entries = dict(sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end)))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            raise SafetensorError(f"tensor {name} is not where its header says")
        end = entry.end
    if size != 8 + length + end:
        raise SafetensorError(f"it has {size} bytes instead of {8 + length + end}: truncated, or of another format")
    return entries, metadata


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> _Entry:
    """Parse a header's entry of one tensor.

    Raises:
        ValueError: it makes no sense.
    """
    start, end = data_offsets
    whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    if not whole or start > end or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise ValueError
    if dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError
    return _Entry(dtype, tuple(shape), start, end)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256, in hexadecimal, over names, types, shapes and bytes of tensors, in any order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_sha256(path: Path) -> str:
    """Return the sha256, in hexadecimal, of a file's bytes.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with reading(path):
        return files.file_sha256(path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors while a checkpoint file is read into CheckpointError; pipes and devices are not opened."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise SafetensorError("it is not a file")
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return in one line what an operating system or format error says, without the path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
