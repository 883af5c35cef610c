"""Where images lie: a folder, a zip or a tar read without unpacking, or files here and there."""

import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
"""Endings of file names taken for images; whatever else lies in a data set is passed over."""


class Source(Protocol):
    """A place of images; it may be read by several threads at once, and travels to other processes."""

    label: str
    """What it is called in messages: its name without the folders above it."""

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield path and size in bytes of each image."""

    def read(self, member: str, most: int = -1) -> bytes:
        """Return the content of an image's file, or so many bytes from its beginning at most."""


@dataclass
class FolderSource:
    """A folder of class folders."""

    root: Path
    label: str

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the path below the root, with forward slashes, and size in bytes of each file."""
        for folder, _, names in os.walk(self.root, followlinks=True, onerror=_raise):
            inside = Path(folder).relative_to(self.root)
            for member in (inside / name for name in names):
                if _is_image(member.as_posix()):
                    yield member.as_posix(), _size(self.root / member)

    def read(self, member: str, most: int = -1) -> bytes:
        """Return the content of a file, or its beginning."""
        return _read_file(self.root / member, most)


@dataclass
class FileListSource:
    """FileListSource of any names, wherever they lie; a path of each is its member."""

    members_given: Sequence[str]
    label: str = ""

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the path, as it was given, and size in bytes of each file."""
        return ((member, _size(Path(member))) for member in self.members_given)

    def read(self, member: str, most: int = -1) -> bytes:
        """Return the content of a file, or its beginning."""
        return _read_file(Path(member), most)


@dataclass
class ZipSource:
    """A zip of a folder of class folders."""

    root: Path
    label: str
    _open: tuple[int, zipfile.ZipFile] | None = field(default=None, repr=False)

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the stored name and size in bytes of each file."""
        return ((info.filename, info.file_size) for info in self._archive().infolist() if _is_image(info.filename))

    def read(self, member: str, most: int = -1) -> bytes:
        """Return the content of a file, or its beginning."""
        with self._archive().open(member) as file:
            return file.read(most)

    def _archive(self) -> zipfile.ZipFile:
        """Return the zip opened by this very process: a forked one would share its parent's file position."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self.root))
        return self._open[1]

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root, "label": self.label, "_open": None}


@dataclass
class TarSource:
    """A tar of images and, as WebDataset has it, of other files about each, told apart by their endings."""

    root: Path
    label: str
    _places: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the stored name and size in bytes of each image, having looked through the tar."""
        with tarfile.open(self.root, "r:") as tar:
            while info := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember each to the end
                if info.isfile():
                    self._places[info.name] = info.offset_data, info.size
        return ((name, size) for name, (_, size) in self._places.items() if _is_image(name))

    def read(self, member: str, most: int = -1) -> bytes:
        """Return the content of a file, or its beginning."""
        start, size = self._places[member]
        with self.root.open("rb") as file:
            file.seek(start)
            return file.read(size if most < 0 else min(size, most))

    def beside(self, member: str, ending: str) -> bytes | None:
        """Return the content of the file of this ending that belongs to the same sample, None where there is none."""
        folder, _, name = member.rpartition("/")
        sibling = f"{folder}/{name.partition('.')[0]}.{ending}".lstrip("/")
        return self.read(sibling) if sibling in self._places else None


def _read_file(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most)


def _raise(error: OSError) -> None:
    """Stop `os.walk` at a folder that cannot be listed; by itself it would pass over it in silence."""
    raise error


def _size(path: Path) -> int:
    """Return the size of a file in bytes, 0 for a link that leads nowhere: reading it will say so."""
    return path.stat().st_size if path.exists() else 0


def path_parts(member: str) -> list[str]:
    """Return the folders and the file name of a path inside a source, whichever system wrote it."""
    return [part for part in member.replace("\\", "/").split("/") if part not in ("", ".")]


def _is_image(member: str) -> bool:
    """Return whether a path inside a source is an image's, not hidden and not a Mac's shadow of one."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path_parts(member))
    return not hidden and member.lower().endswith(IMAGE_SUFFIXES)
