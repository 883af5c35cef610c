"""Files that appear whole or not at all, whether they can be written, and how much memory there is. No torch here."""

import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory, gettempdir
from threading import get_native_id
from time import time
from typing import Any, BinaryIO

from varcli.errors import RunError, UsageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write; give it the final name once the block ends well, else leave nothing.

    Until then the file is in a temporary folder, one per thread, so that several threads and processes may write one
    name at once: the last to finish wins. What a killed process left is removed when the next process writes there.
    The file is on the disk before it gets the name, and its permissions follow the user's umask.

    Raises:
        OSError: it cannot be written.
    """
    _clear(path.parent.absolute())
    folder = path.with_name(temporary_name(path))
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files that only their owner can read
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
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


def read_in_pieces(file: BinaryIO, most: int) -> bytes:
    """Return what comes of a file or pipe, at most so many bytes.

    Asked for all of them at once, Python would set aside the memory for them, however short the file is.

    Raises:
        OSError: it cannot be read.
    """
    content = BytesIO()
    while piece := file.read(min(1 << 14, most - content.tell())):
        content.write(piece)
    return content.getvalue()


def file_state(file: Path | int) -> tuple[int, int, int]:
    """Return inode, size and time of change of a file, by path or descriptor: other ones mean that it was changed.

    Raises:
        OSError: there is no such file.
    """
    status = os.stat(file)  # noqa: PTH116 - of a descriptor too
    return status.st_ino, status.st_size, status.st_mtime_ns


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text from any source.

    Raises:
        ValueError: it is no JSON, is nested too deeply to be read, or holds half a character (a lone surrogate).
    """
    try:
        found = json.loads(text)
        if b"\\ud" in (text.encode(errors="replace") if isinstance(text, str) else text).lower():
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    return found


# --- temporary files ----------------------------------------------------------------------------------------


def temporary_name(path: Path) -> str:
    """Return the name of the folder in which this thread writes a file, short however long the file's name is."""
    return f".varcli-{_short(path.name, 16)}-{_short(platform.node(), 4)}-{os.getpid()}-{get_native_id()}.tmp"


_TEMPORARY = re.compile(r"\.varcli-[0-9a-f]{16}-(?P<machine>[0-9a-f]{4})-(?P<process>\d+)-\w+\.tmp")


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a new folder, among the system's temporary ones, that only this user can enter; remove it at the end.

    What a killed process left is removed when the next one is made.
    """
    parent = Path(gettempdir())
    _clear(parent)
    stem = temporary_name(parent / "private").removesuffix(".tmp")
    with TemporaryDirectory(prefix=f"{stem}_", suffix=".tmp", dir=parent) as folder:
        yield Path(folder)


def _short(name: str, length: int) -> str:
    return sha256(os.fsencode(name)).hexdigest()[:length]


@cache
def _clear(folder: Path) -> None:
    """Remove the temporary files of ended processes; once per folder, which may hold many files."""
    with suppress(OSError):  # what cannot be read is left as it is
        for temporary in folder.iterdir():
            if _abandoned(temporary):
                shutil.rmtree(temporary, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    """Whether a temporary folder's process is gone; for another machine's, only its age tells."""
    found = _TEMPORARY.fullmatch(folder.name)
    if not found:
        return False
    if found["machine"] == _short(platform.node(), 4):
        return not _runs(int(found["process"]))
    return time() - folder.stat().st_mtime > _LONGEST


def _runs(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


_LONGEST = 24 * 3600
"""Seconds after which a temporary file counts as abandoned."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    A device or pipe, such as /dev/null, is written to as it is.

    Raises:
        RunError: it cannot be written: no such folder, no permission, no space.
    """
    in_place = kind_there(path) == "device"
    try:
        with nullcontext(path) if in_place else replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise cannot_write(path, error) from error


def check_writable(path: Path) -> None:
    """Check that a file can be written, without touching it.

    Raises:
        RunError: it cannot.
    """
    there = kind_there(path)
    if there == "folder":
        raise cannot_write(path, IsADirectoryError(0, "it is a folder"))
    if there != "device":
        check_folder(path.parent, path)


def check_not_read(option: str, out: Path, inputs: Iterable[str | Path]) -> None:
    """Check that the output that an option names is none of the files or folders that are read.

    Raises:
        UsageError: it is, and would be replaced.
    """
    for name in inputs:
        same = False
        with suppress(OSError, ValueError):  # one is not there, or no path at all
            same = out.samefile(name)
        if same:
            raise UsageError(f"--{option} {out} is what is read, and would be replaced: give another name")


def check_folder(folder: Path, wanted: Path | None = None) -> None:
    """Check that files can be written in a folder; an error names `wanted`, or else the folder.

    Raises:
        RunError: they cannot.
    """
    trial = folder / f".varcli-{token_hex(4)}.tmp"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise cannot_write(wanted or folder, error) from error


def kind_there(path: Path) -> str:
    """Whether a folder, a file, a device (or pipe) or nothing is at a path."""
    try:
        if path.is_dir():
            return "folder"
        return "file" if path.is_file() else "device" if path.exists() else "nothing"
    except OSError as error:
        raise cannot_write(path, error) from error


def machine_memory() -> int | None:
    """Return the bytes of memory of this machine, None where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def cannot_write(path: Path, error: OSError, advice: str = "") -> RunError:
    """Return the error for an output that the system refuses."""
    missing = isinstance(error, FileNotFoundError) and not path.parent.exists()
    reason = f"there is no folder {path.parent}" if missing else error.strerror or str(error)
    what = "standard output" if path == Path("-") else path
    return RunError(f"{what} cannot be written: {reason}" + (f"; {advice}" if advice else ""))


def cannot_lock(folder: Path, error: OSError | NotImplementedError) -> RunError:
    """Return the error for a folder on a file system without locks, which keep a second process out."""
    reason = getattr(error, "strerror", None) or "its file system has no locks"
    return RunError(f"{folder} cannot be locked ({reason}): choose a folder on another file system")
