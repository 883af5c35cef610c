"""Where the pictures of a data set lie: a folder, or a zip read without unpacking."""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

PICTURE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
"""Endings of file names taken for pictures; whatever else lies in a data set is passed over."""


class Source(Protocol):
    """A folder or an archive of pictures."""

    label: str
    """What it is called in messages: its name without the folders above it."""

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield path and size in bytes of each picture."""

    def read(self, member: str) -> bytes:
        """Return the content of a picture's file."""


@dataclass
class Folder:
    """A folder of class folders."""

    root: Path
    label: str

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the path below the root, with forward slashes, and size in bytes of each file."""
        for folder, _, names in os.walk(self.root, followlinks=True, onerror=_raise):
            inside = Path(folder).relative_to(self.root)
            for member in (inside / name for name in names):
                if _is_picture(member.as_posix()):
                    yield member.as_posix(), _size(self.root / member)

    def read(self, member: str) -> bytes:
        """Return the content of a file."""
        return (self.root / member).read_bytes()


@dataclass
class Zip:
    """A zip of a folder of class folders."""

    root: Path
    label: str
    _open: tuple[int, zipfile.ZipFile] | None = field(default=None, repr=False)

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the stored name and size in bytes of each file."""
        return ((info.filename, info.file_size) for info in self._archive().infolist() if _is_picture(info.filename))

    def read(self, member: str) -> bytes:
        """Return the content of a file."""
        return self._archive().read(member)

    def _archive(self) -> zipfile.ZipFile:
        """Return the zip opened by this very process: a forked one would share its parent's file position."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self.root))
        return self._open[1]

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root, "label": self.label, "_open": None}


def _raise(error: OSError) -> None:
    """Stop `os.walk` at a folder that cannot be listed; by itself it would pass over it in silence."""
    raise error


def _size(path: Path) -> int:
    """Return the size of a file in bytes, 0 for a link that leads nowhere: reading it will say so."""
    return path.stat().st_size if path.exists() else 0


def path_parts(member: str) -> list[str]:
    """Return the folders and the file name of a path inside a source, whichever system wrote it."""
    return [part for part in member.replace("\\", "/").split("/") if part not in ("", ".")]


def _is_picture(member: str) -> bool:
    """Return whether a path inside a source is a picture's, not hidden and not a Mac's shadow of one."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path_parts(member))
    return not hidden and member.lower().endswith(PICTURE_SUFFIXES)
