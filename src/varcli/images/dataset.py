"""Sets of images with their labels, to train on or to evaluate, from folders, archives and lists of files.

Opening a set lists names; to evaluate, headers are read too, so that unreadable images and other sizes show
before long work begins. Pixels are decoded only when asked for. A set pickles, for worker processes.

Shapes: B images of P × P pixels.
"""

import os
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b, sha256
from itertools import compress, islice
from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from varcli.classes import KEYWORDS, ClassTable
from varcli.console import counted, in_words
from varcli.errors import InputError, UsageError
from varcli.images.decode import UnreadableImage, adm_crop, decode_image, open_image, reading_image
from varcli.images.labels import (
    TRAINING_SPLITS,
    Label,
    Layout,
    class_folders,
    class_name,
    class_table,
    natural_key,
    provenance_label,
    source_labels,
    stored_provenance,
)
from varcli.images.provenance import KEYWORD
from varcli.images.sources import FileListSource, FolderSource, Source, open_source, path_parts

if TYPE_CHECKING:
    from varcli.images.provenance import Pixels


class Header(NamedTuple):
    """What the header of an image file says."""

    size: tuple[int, int]
    """Width and height in pixels."""
    format: str
    """Pillow's name of its format."""
    digest: bytes
    """Of what was read: the beginning of the file, or all of it."""
    series: str | None
    """`Provenance.series` of an image that `var` sampled."""


class ImageFile(NamedTuple):
    """An image of a set."""

    source: Source
    member: str
    """Its path inside the source."""
    bytes: int
    """Size of its file."""
    header: Header | None = None
    """None for a set opened without reading headers."""

    @property
    def name(self) -> str:
        """Its name in messages, e.g. ``train-0.zip/n01443537/n01443537_0.JPEG``."""
        return f"{self.source.name}/{self.member}" if self.source.name else self.member


class ImageSet:
    """Images in a fixed order."""

    def __init__(
        self,
        classes: ClassTable,
        images: Sequence[ImageFile],
        labels: Sequence[int],
        *,
        resize: int | None = None,
        skip_bad: bool = False,
        skipped: Sequence[str] = (),
        account: Sequence[str] = (),
    ) -> None:
        """Take images in order; see `open_images` for what the other arguments mean.

        Raises:
            InputError: headers were read, nothing is resized, and an image is not square or of another size than most.
        """
        self.classes = classes
        self.labels = list(labels)
        """Position of each image's class in the table, -1 if not known."""
        self.skipped = list(skipped)
        """Names of the unreadable images skipped so far, each with the reason."""
        self.account = list(account)
        """What was found, and what was left out and why: lines for the user, before work begins."""
        self._images = images
        self._resize = resize
        self._skip_bad = skip_bad
        sizes = [(image.name, image.header.size) for image in images if image.header]
        self.side = resize or (_common_side(sizes) if sizes else 0)
        """Pixels along each side of what `pixels` returns; 0 if sizes may differ, because no header was read."""

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        return self._images[i].name

    def read(self, i: int) -> Image.Image:
        """Image i as RGB, in its own size.

        Raises:
            UnreadableImage: it cannot be read or decoded.
        """
        image = self._images[i]
        with reading_image(image.name):
            return decode_image(image.source.read(image.member), image.name)

    def pixels(self, i: int) -> "Pixels":
        """Image i as uint8 (P, P, 3), cropped and resized if the set says so.

        Raises:
            UnreadableImage: it cannot be read or decoded.
        """
        image = self.read(i)
        return np.asarray(image) if self._resize is None else adm_crop(image, self._resize)

    def batches(self, indices: Iterable[int], size: int) -> Iterator[tuple[list[int], "Pixels", list[int]]]:
        """Yield up to `size` images at a time: their indices, pixels (B, P, P, 3) and labels.

        Threads read a few batches ahead. Bad images are missing if they are skipped, and named in `skipped`.

        Raises:
            UnreadableImage: one cannot be decoded.
        """
        left = iter(indices)
        waiting: deque[dict[int, Future[Pixels]]] = deque()
        pool = ThreadPoolExecutor()
        try:
            while True:
                while len(waiting) <= _BATCHES_AHEAD and (batch := list(islice(left, size))):
                    waiting.append({i: pool.submit(self.pixels, i) for i in batch})
                if not waiting:
                    return
                if read := self._results(waiting.popleft()):
                    yield list(read), np.stack(list(read.values())), [self.labels[i] for i in read]
        finally:
            pool.shutdown(cancel_futures=True)

    def _results(self, batch: dict[int, "Future[Pixels]"]) -> dict[int, "Pixels"]:
        """The images of a batch that could be read."""
        read = {}
        for i, reading in batch.items():
            try:
                read[i] = reading.result()
            except UnreadableImage as error:
                if not self._skip_bad:
                    raise
                self.skipped.append(f"{error.name} ({error.reason})")
        return read

    # --- facts -----------------------------------------------------------------------------------------

    @property
    def jpegs(self) -> int:
        """Number of JPEG files, for a set whose headers have been read."""
        return sum(image.header is not None and image.header.format in ("JPEG", "MPO") for image in self._images)

    def series(self) -> Counter[str]:
        """Number of images of each series that `var` sampled, for a set whose headers have been read."""
        return Counter(image.header.series for image in self._images if image.header and image.header.series)

    def class_counts(self) -> list[int]:
        """Number of images per class."""
        counts = Counter(self.labels)
        return [counts[label] for label in range(len(self.classes))]

    def fingerprint(self) -> str:
        """sha256 by which a run recognizes its images, wherever they have been moved.

        Over names, sizes in bytes and headers or, without headers, classes. Reading all files would take too long.
        """
        evaluated = any(image.header for image in self._images)
        digest = sha256(f"{self._resize}\n".encode() if evaluated else self.classes.to_json().encode())
        for image, label in zip(self._images, self.labels, strict=True):
            if image.header:
                facts, last = f"{image.name}\t{image.bytes}\t", image.header.digest
            else:
                facts, last = f"{label}\t{image.member}\t{image.bytes}", b""
            digest.update(facts.encode(errors="surrogatepass") + last + b"\n")
        return digest.hexdigest()

    def copies(self, most: int = 1000) -> float:
        """The part of the images that equal an earlier one byte for byte.

        Only files of equal size are compared: `most` of them at most, in groups of one size chosen at random, from
        which the rest is estimated. An image that was encoded again is not found.
        """
        of_size: dict[int, list[int]] = {}
        for i, image in enumerate(self._images):
            of_size.setdefault(image.bytes, []).append(i)
        groups = [group for group in of_size.values() if len(group) > 1]
        candidates = sum(map(len, groups))
        random.Random(0).shuffle(groups)
        read = copied = 0
        for group in groups:
            if read and read + len(group) > most:
                break
            digests = []
            for i in group[:most]:
                with suppress(UnreadableImage), reading_image(self.name(i)):
                    digests.append(sha256(self._images[i].source.read(self._images[i].member)).digest())
            read += len(group[:most])
            copied += len(digests) - len(set(digests))
        return copied / read * candidates / len(self) if read else 0.0

    # --- parts -----------------------------------------------------------------------------------------

    def subset(self, indices: Iterable[int]) -> "ImageSet":
        """The set of these images, with the same classes."""
        indices = list(indices)
        return ImageSet(
            self.classes,
            [self._images[i] for i in indices],
            [self.labels[i] for i in indices],
            resize=self._resize,
            skip_bad=self._skip_bad,
            skipped=self.skipped,
        )

    def resized(self, side: int) -> "ImageSet":
        """The set as `var eval --resize` opens it: headers read, images cropped and resized, bad ones skipped.

        Raises:
            InputError: none can be read.
        """
        files = [(image, None, str(i)) for i, image in enumerate(self._images)]
        listed, skipped = _read_headers(files, skip_bad=True)
        labels = [self.labels[int(i)] for _, _, i in listed]
        images = [image for image, _, _ in listed]
        return ImageSet(self.classes, images, labels, resize=side, skip_bad=True, skipped=skipped)

    def split(self, holdout: int) -> tuple["ImageSet", "ImageSet"]:
        """The images to train on, and the last `holdout` of each class to validate on.

        Raises:
            UsageError: `holdout` is negative or leaves a class nothing to train on.
        """
        left = Counter(self.labels)
        if holdout < 0 or holdout >= min(left.values(), default=holdout + 1):
            fewest = "".join(f"; {self.classes.entries[label].name} has {n}" for label, n in left.most_common()[-1:])
            raise UsageError(
                f"--holdout must be at least 0 and leave images of every class to train on (got {holdout}{fewest})"
            )
        training: list[int] = []
        held_out: list[int] = []
        for i, label in enumerate(self.labels):
            (training if left[label] > holdout else held_out).append(i)
            left[label] -= 1
        return self.subset(training), self.subset(held_out)


_BATCHES_AHEAD = 2
"""Batches being read while one is processed."""


def _common_side(sizes: Sequence[tuple[str, tuple[int, int]]]) -> int:
    """The side of all images, from names and sizes.

    Raises:
        InputError: one is not square, or of another size than most.
    """
    ((usual, _), *_) = Counter(size for _, size in sizes).most_common(1)
    for name, size in sizes:
        if len({*size, *usual}) > 1:
            others = f", but most are {_by(usual)}" if size != usual else ""
            raise InputError(
                f"{name} is {_by(size)} pixels{others}; images must be squares of one size, "
                "or --resize SIDE crops and resizes them as ADM does"
            )
    return usual[0]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


# --- opening -----------------------------------------------------------------------------------------

_Listed = tuple[ImageFile, Label, str]
"""An image, its label, and its path inside its class folder."""


def open_images(
    paths: Sequence[str | Path],
    *,
    require_labels: bool = False,
    read_headers: bool = True,
    resize: int | None = None,
    skip_bad: bool = False,
    lines: Iterable[str] = (),
) -> ImageSet:
    """Open the images of folders, zips, tars (WebDataset), .npz and files as one set.

    Labels come from class folders, from file names and provenance as `var sample` writes them, or from the
    ``.cls`` or `arr_1` of an archive. Folders of one name are one class wherever they are.

    Args:
        paths: where they are; ``-`` stands for one path per line of `lines`.
        require_labels: leave out images without a label, and order the others by label, then by the natural order
            of names inside the class. Otherwise they are ordered by name as text, as torch-fidelity orders files.
        read_headers: read the header of each image, so that sizes are checked; False lists names only.
        resize: side in pixels to which each is cropped and resized; None takes squares of one size as they are.
        skip_bad: skip unreadable images instead of raising.
        lines: standard input.

    Raises:
        InputError: a path cannot be opened or is given twice, there are no images, some cannot be read, have no
            label though one is required, or are of several sizes.
    """
    sources = _open_sources(paths, lines, require_labels)
    left_out: dict[str, list[str]] = {}
    remarks: list[str] = []
    listed = [item for source in sources for item in _list_images(source, require_labels, left_out, remarks)]
    skipped: list[str] = []
    if read_headers:
        listed, skipped = _read_headers(listed, skip_bad)
    classes, labels = class_table([label for _, label, _ in listed])
    if require_labels:
        keyed = [
            (label, natural_key(inside), image.member, image)
            for (image, _, inside), label in zip(listed, labels, strict=True)
        ]
        keyed.sort(key=lambda item: item[:3])  # equal keys of several sources stay in the order of the paths
        in_order = [(image, label) for label, _, _, image in keyed]
    else:
        in_order = sorted(
            ((image, label) for (image, *_), label in zip(listed, labels, strict=True)), key=lambda item: item[0].name
        )
    return ImageSet(
        classes,
        [image for image, _ in in_order],
        [label for _, label in in_order],
        resize=resize,
        skip_bad=skip_bad,
        skipped=skipped,
        account=[_found(classes, labels), *_in_lines(left_out), *remarks, *_unnamable(classes)],
    )


def _open_sources(paths: Sequence[str | Path], lines: Iterable[str], require_labels: bool) -> list[Source]:
    listed = [line.rstrip("\r\n") for line in lines]
    if any("\0" in line for line in listed):  # find -print0
        listed = "\n".join(listed).split("\0")
    names = [os.fspath(name) for path in paths for name in (filter(None, listed) if str(path) == "-" else [path])]
    twice = [path for path, count in Counter(map(os.path.abspath, names)).items() if count > 1]
    if twice:
        raise InputError(f"each path of images must be given only once (got {in_words(twice)} twice)")
    if not names:
        raise InputError("no path of images was given")
    if "" in names:
        raise InputError("a path of images is empty; expected a folder, an archive or an image file")
    if not require_labels:
        names.sort()  # images of one name are in the order of their paths
    archives = {name: open_source(Path(name)) for name in names}
    files = [name for name, archive in archives.items() if archive is None]
    if files and require_labels:
        raise InputError(f"{in_words(files)} is not a folder, .zip, .tar or .npz of images with labels")
    _check_apart(names, [name for name, archive in archives.items() if isinstance(archive, FolderSource)])
    return [*filter(None, archives.values()), *([FileListSource(files)] if files else [])]


def _check_apart(names: Sequence[str], folders: Sequence[str]) -> None:
    """Check that no path lies in a folder that is given too: its images would count twice.

    Raises:
        InputError: one does.
    """
    given = {os.path.realpath(folder): folder for folder in folders}
    for name in names:
        path = Path(os.path.realpath(name if name in folders else Path(name).parent))  # links to files are images
        for around in (path, *path.parents):
            if given.get(str(around), name) != name:
                raise InputError(f"{name} is in {given[str(around)]}, which is given too: its images would count twice")


def _list_images(
    source: Source, require_labels: bool, left_out: dict[str, list[str]], remarks: list[str]
) -> list[_Listed]:
    """The images of a source that have what is required; others are added to `left_out` by kind."""
    members = list(source.members())

    def leave_out(kind: str, inside: Iterable[str]) -> None:
        if names := [f"{source.name}/{each}" if source.name else each for each in inside]:
            left_out.setdefault(kind, []).extend(names)

    for kind, inside in source.left_out.items():
        leave_out(kind, inside)
    remarks += (f"{source.name}: {remark}" for remark in source.remarks)
    if not members:
        raise InputError(
            f"{source.name} has no images; expected a folder, .zip, .tar or .npz of images"
            + "".join(f"; {line}" for line in _in_lines(left_out))
        )
    names = [member for member, _ in members]
    layout = class_folders(names)
    trained_on = {split for split in layout.splits if split and split.casefold() in TRAINING_SPLITS}
    if require_labels and any(layout.splits):
        if len(trained_on) != 1:
            raise InputError(f"{source.name} has the splits {in_words(_splits(layout))}; give the one to train on")
        chosen = [split in trained_on for split in layout.splits]
        leave_out(
            f"images outside of {trained_on.pop()}, the split that is trained on",
            (name for name, taken in zip(names, chosen, strict=True) if not taken),
        )
    else:
        chosen = [True] * len(names)
        if any(layout.splits):
            remarks.append(f"{source.name}: its splits {in_words(_splits(layout))} are taken together")
    labels = source_labels(source, names, layout.folders, require_labels)
    if require_labels and not any(compress(labels, chosen)):
        raise InputError(
            f"{source.name} has {counted(sum(chosen), 'image')} without labels; "
            "expected one folder per class, or an archive with labels"
        )
    if require_labels:
        unlabelled = [taken and not label for taken, label in zip(chosen, labels, strict=True)]
        leave_out("images without a label", compress(names, unlabelled))
    if any(isinstance(label, str) for label in labels) and (empty := _empty_classes(source, names, layout, chosen)):
        remarks.append(f"{source.name}: class folders without images: {in_words(empty)}")
    return [
        (ImageFile(source, member, size), label, inside)
        for (member, size), label, inside, taken in zip(members, labels, layout.insides, chosen, strict=True)
        if taken and (label or not require_labels)
    ]


def _splits(layout: Layout) -> list[str]:
    return sorted({split for split in layout.splits if split})


def _empty_classes(source: Source, names: Sequence[str], layout: Layout, chosen: Sequence[bool]) -> list[str]:
    """Folders beside the class folders of a source that hold no image, or none that was chosen."""
    used = {folder for folder, taken in zip(layout.folders, chosen, strict=True) if taken}
    around = {tuple(path_parts(name)[: layout.level]) for name in compress(names, map(bool, layout.folders))}
    paths = [path_parts(folder) for folder in source.folders]
    beside = {
        class_name(parts[layout.level])
        for parts in paths
        if len(parts) > layout.level and tuple(parts[: layout.level]) in around
    }
    return sorted(beside - used, key=natural_key)


# --- lines for the user -------------------------------------------------------------------------------


def _found(classes: ClassTable, labels: Sequence[int]) -> str:
    """How many images of how many classes there are."""
    found = counted(len(labels), "image")
    if len(classes):
        found += f" of {counted(len(classes), 'class')}: {in_words([*map(str, classes.entries)])}"
    return found


def _in_lines(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """What was left out, a line each kind: its number and first names."""
    return [f"left out: {kind} ({len(names)}): {in_words(names)}" for kind, names in left_out.items()]


def _unnamable(classes: ClassTable) -> list[str]:
    """A line about classes whose names are keywords of `--class`, or other classes' numbers."""
    names = [
        str(entry)
        for entry in classes.entries
        if entry.name.lower() in {"-", *KEYWORDS}
        or (entry.name.isdecimal() and (entry.name.lstrip("0") or "0") != str(entry.id))
    ]
    return [f"{in_words(names)} must be given by number: the name has another meaning"] if names else []


# --- headers -----------------------------------------------------------------------------------------

_HEADER_BYTES = 8192
"""Bytes that nearly always hold the header of a file."""


def _read_headers(listed: Sequence[_Listed], skip_bad: bool) -> tuple[list[_Listed], list[str]]:
    """The images whose headers can be read, and the names of the others with the reason.

    Raises:
        InputError: some cannot be read, unless they are skipped and others remain.
    """
    good: list[_Listed] = []
    bad: dict[str, str] = {}
    for image, label, inside in listed:
        try:
            with suppress(UnreadableImage):
                good.append((*_with_header(image, label, _HEADER_BYTES), inside))
                continue
            good.append((*_with_header(image, label, -1), inside))
        except UnreadableImage as error:
            bad[error.name] = f"{error.name} ({error.reason})"
    if bad and not (skip_bad and good):
        reasons = in_words([bad[name] for name in sorted(bad)])
        raise InputError(
            f"{len(bad)} of {len(listed)} images cannot be read: {reasons}; fix or remove them, or use --skip-bad"
        )
    return good, [bad[name] for name in sorted(bad)]


def _with_header(file: ImageFile, label: Label, limit: int) -> tuple[ImageFile, Label]:
    """An image with the header in its first `limit` bytes, and its label, which is in our own PNGs."""
    with reading_image(file.name):
        content = file.source.read(file.member, limit)
        with open_image(content) as image:
            provenance = stored_provenance(str(image.info.get(KEYWORD, "")))
            digest = blake2b(content, digest_size=16).digest()
            series = intern(provenance.series) if provenance else None
            if provenance and not label:
                label = provenance_label(provenance)
            return file._replace(header=Header(image.size, image.format or "", digest, series)), label
