"""Images to measure, or to measure against, in one order, of one size.

Opening reads names and headers only, so that what is unreadable or of another size shows before long
work begins. Pixels are decoded as they are asked for.

Shapes: B images of P × P pixels.
"""

import os
import tarfile
import zipfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varcli.errors import InputError
from varcli.images.arrays import NpzSource
from varcli.images.decode import UnreadableImage, center_crop, decode_image, reading_image
from varcli.images.labels import Label, entry_of, labels_by_name, numbered, rows_of
from varcli.images.provenance import KEYWORD, provenance_from_json
from varcli.images.sources import FileListSource, FolderSource, Source, TarSource, ZipSource

_HEAD = 8192
"""Bytes of a file that nearly always hold its header."""


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image that was found."""

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


def list_images(paths: Sequence[str | Path], lines: Iterable[str] = ()) -> list[ListedImage]:
    """Return what lies at each path in order of names, with the classes these tell; ``-`` is one path a line.

    Raises:
        InputError: a path cannot be opened, has no images, or is given twice.
    """
    typed = filter(None, (line.rstrip("\r\n") for line in lines))
    given = sorted(os.fspath(name) for path in paths for name in (typed if os.fspath(path) == "-" else [path]))
    twice = [path for path, count in Counter(map(os.path.abspath, given)).items() if count > 1]
    if twice or not given:
        raise InputError(f"images: {in_words(twice) or 'no path'}; each path once, and at least one")
    archives = {path: _archive(Path(path)) for path in given}
    files = [path for path, archive in archives.items() if archive is None]
    sources = [*filter(None, archives.values()), *([FileListSource(files)] if files else [])]
    return sorted((image for source in sources for image in _members(source)), key=lambda image: image.name)


def in_words(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _archive(path: Path) -> Source | None:
    """Return the folder or archive at a path, None for a file by itself."""
    try:
        if path.is_dir():
            return FolderSource(path, path.resolve().name)
        path.stat()
    except OSError as error:
        raise InputError(f"images: {path}; {error.strerror or error}") from error
    if path.suffix.lower() == ".npz":
        return NpzSource(path)
    kinds = {".tar": TarSource, ".zip": ZipSource}
    kind = kinds.get(path.suffix.lower())
    return kind(path, path.name) if kind else None


def _members(source: Source) -> list[ListedImage]:
    try:
        members = list(source.members())
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"images: {source.label} cannot be listed; {error}") from error
    if not members:
        raise InputError(f"images: {source.label} has none; a folder, .zip, .npz or .tar of images")
    labels = labels_by_name([member for member, _ in members])
    return [ListedImage(source, member, size, label) for (member, size), label in zip(members, labels, strict=True)]


# --- what they are ---------------------------------------------------------------------------------


def look(image: ListedImage) -> ListedImage | UnreadableImage:
    """Return an image with what its header says, or what is wrong with it."""
    try:
        with suppress(UnreadableImage):
            return _with_header(image, _HEAD)
        return _with_header(image, -1)
    except UnreadableImage as error:
        return error


def _with_header(listed: ListedImage, most: int) -> ListedImage:
    with reading_image(listed.name):
        content = listed.source.read(listed.member, most)
        digest = blake2b(content, digest_size=16).digest()
        with Image.open(BytesIO(content)) as image:
            label = listed.label or _label_inside(image, listed.name) or _label_beside(listed)
            return replace(listed, size=image.size, format=image.format or "", label=label, digest=digest)


def _label_inside(image: Image.Image, name: str) -> Label:
    """Return the class that a PNG of ours says it is of."""
    with suppress(KeyError, InputError):  # none, or of another version
        made = provenance_from_json(str(image.info[KEYWORD]), name)
        return None if made.class_id is None else entry_of(made.class_id, made.class_name)
    return None


def _label_beside(image: ListedImage) -> Label:
    """Return the class that an archive has for an image."""
    if isinstance(image.source, NpzSource):
        return image.source.entry(image.member)
    if isinstance(image.source, TarSource):
        with suppress(ValueError):
            return numbered(int(image.source.beside(image.member, "cls") or b""))
    return None


Pixels = NDArray[np.uint8]

_AHEAD = 2
"""Batches being read while one is worked on."""


class ImageList:
    """Images of one size in their canonical order, that of their names: image i has rank i.

    The order is that of the paths as text, as torch-fidelity takes files, in whatever order they were found.
    """

    def __init__(
        self, images: Sequence[ListedImage], resize: int | None, skip_bad: bool = False, skipped: Sequence[str] = ()
    ) -> None:
        self._images = images
        self._resize = resize
        self._skip_bad = skip_bad
        self.skipped = list(skipped)
        """Names of images that could not be read and were passed over, so far."""
        self.classes, self.rows = rows_of([image.label for image in self._images])
        """The classes there are, and for each image its row among them, -1 where it has none."""
        self.jpegs = sum(image.format in ("JPEG", "MPO") for image in images)
        """How many are JPEG files."""
        self.side = resize or self._common_side()
        """Pixels along each side of what is measured."""

    def __len__(self) -> int:
        return len(self._images)

    @property
    def names(self) -> list[str]:
        """What to call each image."""
        return [image.name for image in self._images]

    def class_counts(self) -> list[int]:
        """Return how many images each class has."""
        counts = Counter(self.rows)
        return [counts[row] for row in range(len(self.classes))]

    def pixels(self, i: int) -> Pixels:
        """Return image i as uint8 (P, P, 3).

        Raises:
            UnreadableImage: it cannot be read or decoded.
        """
        listed = self._images[i]
        with reading_image(listed.name):
            image = decode_image(listed.source.read(listed.member), listed.name)
        return np.asarray(image) if self._resize is None else center_crop(image, self._resize)

    def batches(self, ranks: Iterable[int], size: int) -> Iterator[tuple[list[int], Pixels, list[int]]]:
        """Yield up to `size` images at a time: their ranks, pixels (B, P, P, 3) and classes' rows.

        Some are read ahead while one batch is at work. Bad ones that are passed over are missing in it, and named
        in `skipped`.

        Raises:
            UnreadableImage: one cannot be decoded.
        """
        left = iter(ranks)
        waiting: deque[dict[int, Future[Pixels]]] = deque()
        pool = ThreadPoolExecutor()
        try:
            while True:
                while len(waiting) <= _AHEAD and (batch := list(islice(left, size))):
                    waiting.append({i: pool.submit(self.pixels, i) for i in batch})
                if not waiting:
                    return
                if read := self._gathered(waiting.popleft()):
                    yield list(read), np.stack(list(read.values())), [self.rows[i] for i in read]
        finally:
            pool.shutdown(cancel_futures=True)

    def _gathered(self, batch: dict[int, Future[Pixels]]) -> dict[int, Pixels]:
        """Return the images of a batch that could be read."""
        read = {}
        for i, reading in batch.items():
            try:
                read[i] = reading.result()
            except UnreadableImage as error:
                if not self._skip_bad:
                    raise
                self.skipped.append(error.name)
        return read

    def fingerprint(self) -> str:
        """Return a sha256 by which a run knows its images again, wherever they have been moved.

        Over each one's name, length and first bytes, and how they are resized: reading them all would take too long.
        """
        digest = sha256(f"{self._resize}\n".encode())
        for image in self._images:
            digest.update(f"{image.name}\t{image.length}\t".encode(errors="surrogatepass") + image.digest + b"\n")
        return digest.hexdigest()

    def _common_side(self) -> int:
        """Return the side of all images.

        Raises:
            InputError: one is no square, or not of the size that most have.
        """
        ((usual, _), *_) = Counter(image.size for image in self._images).most_common(1)
        odd = [image for image in self._images if len({*image.size, *usual}) > 1]
        if odd:
            most = f", most are {_by(usual)}" if odd[0].size != usual else ""
            raise InputError(
                f"images: {odd[0].name} is {_by(odd[0].size)} pixels{most}; squares of one size, "
                "or --resize SIDE to crop and resize as ADM does"
            )
        return usual[0]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def open_images(
    paths: Sequence[str | Path], *, resize: int | None = None, skip_bad: bool = False, lines: Iterable[str] = ()
) -> ImageList:
    """Return the images of folders, zips, .npz, WebDataset .tar and files, all together.

    Args:
        paths: where they lie; ``-`` stands for one path a line of `lines`.
        resize: the side to which each is cropped and resized; None takes squares of one size as they are.
        skip_bad: pass over what cannot be read, rather than end there.
        lines: standard input.

    Raises:
        InputError: a path cannot be opened or is given twice, there are no images, some cannot be read, or they are
            of several sizes.
    """
    listed = list_images(paths, lines)
    looked = [look(image) for image in listed]
    good = [image for image in looked if isinstance(image, ListedImage)]
    bad = [image for image in looked if isinstance(image, UnreadableImage)]
    if bad and not (skip_bad and good):
        reasons = in_words([f"{error.name} ({error.reason})" for error in bad])
        advice = "mend or remove them, or pass over them with --skip-bad"
        raise InputError(f"images: {len(bad)} of {len(listed)} cannot be read, {reasons}; {advice}")
    return ImageList(good, resize, skip_bad, [error.name for error in bad])
