"""Images to train on: folders of class folders, and zips of one, read without unpacking.

Opening lists names only; no pixel is decoded before it is asked for. A set may be handed to worker
processes: it pickles, and each process opens the zips for itself.
"""

import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from varcli.classes import ClassEntry, ClassTable, imagenet
from varcli.errors import InputError, UsageError
from varcli.images.decode import decode_image, reading_image
from varcli.images.sources import FolderSource, Source, ZipSource, path_parts

# --- the set ---------------------------------------------------------------------------------------


class _Member(NamedTuple):
    source: int
    member: str
    row: int
    size: int


class ImageSet:
    """Images with their classes, in order of class and then the natural order of file names."""

    def __init__(self, classes: ClassTable, sources: Sequence[Source], images: Sequence[_Member]) -> None:
        self.classes = classes
        self.rows = [image.row for image in images]
        self._sources = sources
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        """Return what to call image i in a message, e.g. ``train-0.zip/n01443537/n01443537_0.JPEG``."""
        image = self._images[i]
        return f"{self._sources[image.source].label}/{image.member}"

    def read(self, i: int) -> Image.Image:
        """Return image i as RGB.

        Raises:
            UnreadableImage: it cannot be read or decoded.
        """
        image = self._images[i]
        with reading_image(self.name(i)):
            return decode_image(self._sources[image.source].read(image.member), self.name(i))

    def subset(self, indices: Iterable[int]) -> "ImageSet":
        """Return a set of these images, with the same classes."""
        return ImageSet(self.classes, self._sources, [self._images[i] for i in indices])

    def split(self, holdout: int) -> tuple["ImageSet", "ImageSet"]:
        """Return the images to train on, and the last `holdout` of each class to validate on.

        Raises:
            UsageError: `holdout` is negative or leaves a class nothing to train on.
        """
        left = Counter(self.rows)
        if holdout < 0 or holdout >= min(left.values(), default=holdout + 1):
            fewest = ", ".join(f"{self.classes.entries[row].name} has {n}" for row, n in left.most_common()[-1:])
            raise UsageError(f"holdout: {holdout}; 0 or more, and fewer than any class has images ({fewest})")
        training: list[int] = []
        held_out: list[int] = []
        for i, row in enumerate(self.rows):
            (training if left[row] > holdout else held_out).append(i)
            left[row] -= 1
        return self.subset(training), self.subset(held_out)

    def fingerprint(self) -> str:
        """Return a sha256 over classes, names and sizes, the same wherever the files have been moved."""
        digest = sha256(self.classes.to_json().encode())
        for image in self._images:
            digest.update(f"{image.row}\t{image.member}\t{image.size}\n".encode(errors="surrogatepass"))
        return digest.hexdigest()


def open_image_set(paths: Sequence[Path]) -> ImageSet:
    """Return the images of folders of class folders, of zips of such a folder, or of several of these.

    Folders of one name are one class wherever they lie. Where all their names are WordNet ids of
    ImageNet, classes have ImageNet's indices; otherwise they are numbered in natural order. A single
    folder around the class folders does no harm.

    Raises:
        InputError: a path cannot be opened, is given twice, or has no class folders with images.
    """
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise InputError(f"data: {', '.join(map(str, paths))}; each path once")
    sources = [_source(Path(path)) for path in paths]
    found = [(i, *item) for i, source in enumerate(sources) for item in _classified(source)]
    classes = _class_table({folder for _, folder, *_ in found})
    row_of = {entry.wnid: row for row, entry in enumerate(classes.entries)}
    keyed = sorted((row_of[name], natural_key(rest), member, i, size) for i, name, rest, member, size in found)
    return ImageSet(classes, sources, [_Member(i, member, row, size) for row, _, member, i, size in keyed])


def natural_key(text: str) -> list[str | int]:
    """Return a key that sorts numbers inside names by value, n1_2 before n1_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", text))]


def _source(path: Path) -> Source:
    try:
        if path.is_dir():
            return FolderSource(path, path.resolve().name)
        if zipfile.is_zipfile(path):
            return ZipSource(path, path.name)
        path.stat()
    except OSError as error:
        raise InputError(f"data: {path}; {error.strerror or error}") from error
    raise InputError(f"data: {path}; a folder of class folders, or a zip of one")


def _classified(source: Source) -> list[tuple[str, str, str, int]]:
    """Return class name, path within the class, path within the source and size of each image."""
    try:
        listed = [(path_parts(member), member, size) for member, size in source.members()]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"data: {source.label} cannot be listed; {error}") from error
    level = class_level([parts for parts, *_ in listed])
    filed = [item for item in listed if len(item[0]) > level + 1]
    if not filed:
        raise InputError(f"data: {source.label} has {len(listed)} images and no class folders; one folder a class")
    return [(class_name(parts[level]), "/".join(parts[level + 1 :]), member, size) for parts, member, size in filed]


def class_name(folder: str) -> str:
    """Return a folder's name as text: composed letters, which a Mac takes apart, and no bytes that are no letters."""
    return unicodedata.normalize("NFC", folder.encode(errors="replace").decode())


def class_level(paths: Sequence[Sequence[str]]) -> int:
    """Return how deep the class folders lie: below whatever single folder holds everything.

    A folder of a WordNet id holds no classes, nor does one with more images in itself than below.
    """
    wnids = {entry.wnid for entry in imagenet().entries}
    level = 0
    while True:
        inside = [parts for parts in paths if len(parts) > level + 1]
        names = {parts[level] for parts in inside}
        deeper = sum(len(parts) > level + 2 for parts in inside)
        if len(names) != 1 or names <= wnids or deeper <= len(inside) / 2:
            return level
        level += 1


def _class_table(names: set[str]) -> ClassTable:
    known = tuple(entry for entry in imagenet().entries if entry.wnid in names)
    if len(known) == len(names):
        return ClassTable(known)
    ordered = sorted(names, key=natural_key)
    return ClassTable(tuple(ClassEntry(i, name, name.replace("_", " ")) for i, name in enumerate(ordered)))
