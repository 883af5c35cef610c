"""Files that are there whole or not at all, whatever happens while they are written. No torch here."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write; give it the final name once the block ends well, else leave nothing.

    What is written lies in a folder of its own meanwhile, always the same one for the same name, so that
    whatever a killed process left there goes with the next attempt. It is on the disk before it gets the
    name, and its permissions are those the user's umask gives.

    Raises:
        OSError: it cannot be written.
    """
    folder = path.with_name(draft_name(path))
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        draft = folder / path.name
        draft.touch()
        mode = draft.stat().st_mode  # safetensors makes files that only their owner can read
        yield draft
        draft.chmod(mode)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Return the sha256, in hexadecimal, of a file's bytes.

    Raises:
        OSError: the file cannot be read.
    """
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def draft_name(path: Path) -> str:
    """Return the name of the folder in which a file is written, short however long the file's name is."""
    return f".varcli-{sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp"
