"""Files that are there whole or not at all, whatever happens while they are written. No torch here."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import get_native_id
from time import time


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write; give it the final name once the block ends well, else leave nothing.

    What is written lies in a folder of its own meanwhile, each thread's in another, so that several threads
    and processes may write one name at once: the last to finish has it. What a killed process left goes when
    the next process writes there. The file is on the disk before it gets the name, and its permissions are
    those the user's umask gives.

    Raises:
        OSError: it cannot be written.
    """
    _clear(path.parent.absolute())
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


# --- drafts ----------------------------------------------------------------------------------------


def draft_name(path: Path) -> str:
    """Return the name of the folder in which this thread writes a file, short however long the file's name is."""
    return f".varcli-{_short(path.name, 16)}-{_short(platform.node(), 4)}-{os.getpid()}-{get_native_id()}.tmp"


_DRAFT = re.compile(r"\.varcli-[0-9a-f]{16}-(?P<machine>[0-9a-f]{4})-(?P<process>\d+)-\d+\.tmp")


def _short(name: str, length: int) -> str:
    return sha256(os.fsencode(name)).hexdigest()[:length]


@cache
def _clear(folder: Path) -> None:
    """Remove the drafts of processes that are no more; once, as there may be many files to look through."""
    with suppress(OSError):  # what cannot be read is left as it is
        for draft in folder.iterdir():
            if _abandoned(draft):
                shutil.rmtree(draft, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    """Return whether this is a draft that nobody goes on with; of another machine's processes only its age tells."""
    found = _DRAFT.fullmatch(folder.name)
    if not found:
        return False
    if found["machine"] == _short(platform.node(), 4) and not _runs(int(found["process"])):
        return True
    return time() - folder.stat().st_mtime > _LONGEST


def _runs(process: int) -> bool:
    """Return whether there is a process of this number on this machine."""
    if os.name == "nt":
        return True  # to ask as below would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


_LONGEST = 24 * 3600
"""Seconds after which no file is still being written."""
