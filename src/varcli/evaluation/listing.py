"""What lies where: the pictures in folders, archives and files, and what each one's header says."""

import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

from PIL import Image

from varcli.data.datasets import UnreadablePicture, reading_picture
from varcli.data.images import KEYWORD, provenance_from_json
from varcli.data.sources import Files, Folder, Source, Tar, Zip
from varcli.errors import InputError
from varcli.evaluation.arrays import Arrays
from varcli.evaluation.labelling import Label, entry_of, labels_by_name, numbered

_HEAD = 8192
"""Bytes of a file that nearly always hold its header."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A picture that was found."""

    source: Source
    member: str
    length: int
    """Of its file, in bytes."""
    label: Label
    size: tuple[int, int] = (0, 0)
    """Width and height, once its header was read."""
    format: str = ""
    """What Pillow calls it, likewise."""
    digest: bytes = b""
    """Of what was read for that, its beginning or all of it, likewise."""

    @property
    def name(self) -> str:
        """What to call it."""
        return f"{self.source.label}/{self.member}" if self.source.label else self.member


# --- where they lie --------------------------------------------------------------------------------


def list_pictures(paths: Sequence[str | Path], lines: Iterable[str] = ()) -> list[Listed]:
    """Return what lies at each path in order of names, with the classes these tell; ``-`` is one path a line.

    Raises:
        InputError: a path cannot be opened, has no pictures, or is given twice.
    """
    typed = filter(None, (line.rstrip("\r\n") for line in lines))
    given = sorted(os.fspath(name) for path in paths for name in (typed if os.fspath(path) == "-" else [path]))
    twice = [path for path, count in Counter(map(os.path.abspath, given)).items() if count > 1]
    if twice or not given:
        raise InputError(f"pictures: {in_words(twice) or 'no path'}; each path once, and at least one")
    archives = {path: _archive(Path(path)) for path in given}
    files = [path for path, archive in archives.items() if archive is None]
    sources = [*filter(None, archives.values()), *([Files(files)] if files else [])]
    return sorted((picture for source in sources for picture in _members(source)), key=lambda picture: picture.name)


def in_words(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _archive(path: Path) -> Source | None:
    """Return the folder or archive at a path, None for a file by itself."""
    try:
        if path.is_dir():
            return Folder(path, path.resolve().name)
        path.stat()
    except OSError as error:
        raise InputError(f"pictures: {path}; {error.strerror or error}") from error
    if path.suffix.lower() == ".npz":
        return Arrays(path)
    kinds = {".tar": Tar, ".zip": Zip}
    kind = kinds.get(path.suffix.lower())
    return kind(path, path.name) if kind else None


def _members(source: Source) -> list[Listed]:
    try:
        members = list(source.members())
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"pictures: {source.label} cannot be listed; {error}") from error
    if not members:
        raise InputError(f"pictures: {source.label} has none; a folder, .zip, .npz or .tar of pictures")
    labels = labels_by_name([member for member, _ in members])
    return [Listed(source, member, size, label) for (member, size), label in zip(members, labels, strict=True)]


# --- what they are ---------------------------------------------------------------------------------


def look(picture: Listed) -> Listed | UnreadablePicture:
    """Return a picture with what its header says, or what is wrong with it."""
    try:
        with suppress(UnreadablePicture):
            return _with_header(picture, _HEAD)
        return _with_header(picture, -1)
    except UnreadablePicture as error:
        return error


def _with_header(picture: Listed, most: int) -> Listed:
    with reading_picture(picture.name):
        content = picture.source.read(picture.member, most)
        digest = blake2b(content, digest_size=16).digest()
        with Image.open(BytesIO(content)) as image:
            label = picture.label or _label_inside(image, picture.name) or _label_beside(picture)
            return replace(picture, size=image.size, format=image.format or "", label=label, digest=digest)


def _label_inside(image: Image.Image, name: str) -> Label:
    """Return the class that a PNG of ours says it is of."""
    with suppress(KeyError, InputError):  # none, or of another version
        made = provenance_from_json(str(image.info[KEYWORD]), name)
        return None if made.class_id is None else entry_of(made.class_id, made.class_name)
    return None


def _label_beside(picture: Listed) -> Label:
    """Return the class that an archive has for a picture."""
    if isinstance(picture.source, Arrays):
        return picture.source.entry(picture.member)
    if isinstance(picture.source, Tar):
        with suppress(ValueError):
            return numbered(int(picture.source.beside(picture.member, "cls") or b""))
    return None
