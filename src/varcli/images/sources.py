"""Sources of images: a folder, a zip, tar or .npz read without unpacking, or a list of files.

Several threads may read a source at once, and it can be pickled: each process opens its archive for itself.

Shapes: N images of H × W pixels.
"""

import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from itertools import chain
from math import prod
from pathlib import Path
from struct import unpack
from tempfile import TemporaryFile
from tokenize import TokenError
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from varcli.errors import InputError
from varcli.files import file_state
from varcli.images.provenance import Provenance, image_filename, provenance_from_json

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
"""File name endings of images; other files are counted and left out."""


MOST_BYTES = 1 << 30
"""Largest image file that is read, in bytes; longer ones are no images, or decompress without end."""

_DESCRIPTIONS = (
    *(".cls", ".csv", ".db", ".htm", ".html", ".ini", ".json", ".jsonl"),
    *(".log", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml"),
)
"""Endings of files that are usual beside images; they are not mentioned."""

DATASET_JSON = "dataset.json"
"""File in which StyleGAN's and EDM's data sets keep their labels."""

_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
"""First bytes of image files, by which those without an ending are recognized."""

_RUN_FILES = {
    *("metrics.jsonl", "state.safetensors", "state-previous.safetensors"),
    *("model.safetensors", "tokenizer.safetensors"),
}
"""Any of these marks a folder of `var train`, whose previews are no training images."""


class Source(ABC):
    """A store of image files, each known by its path inside."""

    def __init__(self, name: str) -> None:
        self.name = name
        """Its name in messages, without the folders above it."""
        self.left_out: dict[str, list[str]] = {}
        """Files that are not read, by kind in words ("files named .heic"); complete once `members` is exhausted."""
        self.remarks: list[str] = []
        """Other remarks for the user, complete by then."""
        self.folders: set[str] = set()
        """Paths of the folders inside that are known by then, also of those without images."""

    @abstractmethod
    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the path and the size in bytes of each image.

        Raises:
            InputError: it cannot be listed.
        """

    @abstractmethod
    def read(self, member: str, limit: int = -1) -> bytes:
        """Content of an image file, or its first `limit` bytes.

        Raises:
            ValueError: it is longer than `MOST_BYTES`, and `limit` is not given.
        """

    def sidecar(self, member: str, suffix: str) -> bytes | None:
        """Content of the file that describes an image, such as its "cls" or "json"; None if there is none."""
        return None

    def dataset_json(self, folder: Sequence[str]) -> bytes | None:
        """Content of the ``dataset.json`` in a folder inside, where StyleGAN and EDM keep labels, if there is one.

        Args:
            folder: the names of the folders down to it; none is the top.

        Raises:
            ValueError: it is longer than `MOST_BYTES`.
        """
        return None

    def _leave_out(self, kind: str, member: str) -> None:
        self.left_out.setdefault(kind, []).append(member)

    def _is_image(self, member: str) -> bool:
        """Whether a file is an image by its name, or without a proper ending by its first bytes.

        Others are counted in `left_out`, unless they are hidden or describe images.
        """
        if _is_hidden(member):
            return False
        self.folders.add(member.rpartition("/")[0])
        suffix = os.path.splitext(member)[1].lower()  # noqa: PTH122 - a third of the time of listing
        if suffix in IMAGE_SUFFIXES:
            return True
        if suffix in _DESCRIPTIONS:
            return False
        if not re.fullmatch(r"\.[a-z]\w{0,15}", suffix):  # photo, photo.2 and photo.2020-01-01
            if self._begins_like_image(member):
                return True
            suffix = ""
        self._leave_out(f"files named {suffix}" if suffix else "files without an ending that are no images", member)
        return False

    def _begins_like_image(self, member: str) -> bool:
        try:
            return self.read(member, 8).startswith(_SIGNATURES)
        except (*ARCHIVE_ERRORS, OSError):
            return False


_CHANGED = "the file was changed while it was being read"

ARCHIVE_ERRORS = (
    *(zipfile.BadZipFile, RuntimeError, ValueError, KeyError, EOFError, zlib.error, lzma.LZMAError),
    *(TokenError, SyntaxError, TypeError, OverflowError, MemoryError),
)
"""What zipfile and numpy raise for archives that are encrypted, damaged, of unknown methods or absurd."""


def open_source(path: Path) -> Source | None:
    """Folder or archive at a path; None for any other file.

    Raises:
        InputError: there is nothing at this path, it is no file or folder, an .npz has no images, or it is
            a compressed archive.
    """
    try:
        if path.is_dir():
            return FolderSource(path)
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is a pipe or device; expected a folder, an archive or an image file")
        with path.open("rb") as file:
            beginning = file.read(6)
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        raise InputError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error
    for signature, program in _COMPRESSED.items():
        if beginning.startswith(signature):
            raise InputError(f"{path} is compressed; expected a .tar that is not: {program} < {path} > images.tar")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return NpzSource(path)
    if suffix == ".npy":
        raise InputError(f"{path} is a single array; expected an .npz: numpy.savez(file, images)")
    if suffix == ".tar":
        return TarSource(path)
    if suffix == ".zip" or (suffix not in IMAGE_SUFFIXES and zipfile.is_zipfile(path)):
        return ZipSource(path)
    return None


_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of compressed files, and the programs that decompress them."""


class FolderSource(Source):
    """A folder and all folders below it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root.resolve().name)
        self.root = root

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the path below the root, with forward slashes, and the size in bytes of each image.

        Links are followed, but each folder is read once: by its own path if that is below the root, else by the
        first link. So circular links end. Pipes, devices and folders of training runs are left out.
        """
        seen: set[tuple[int, int]] = set()
        folders, links = deque([""]), deque[str]()
        while waiting := folders or links:
            folder = waiting.popleft()
            try:
                there = (self.root / folder).stat()
                if (there.st_dev, there.st_ino) in seen:
                    self._leave_out("links to folders that are read already", folder)
                    continue
                entries = sorted(os.scandir(self.root / folder), key=lambda entry: entry.name)
            except OSError as error:
                raise InputError(f"cannot list {self.name}: {error}") from error
            seen.add((there.st_dev, there.st_ino))
            if folder and _is_training_run(entries):
                self._leave_out("folders of training runs", folder)
                continue
            self.folders.add(folder)
            for entry in entries:
                member = f"{folder}/{entry.name}" if folder else entry.name
                status = _status(entry)
                if status and stat.S_ISDIR(status.st_mode):
                    if not _is_hidden(member):
                        (links if entry.is_symlink() else folders).append(member)
                elif status and not stat.S_ISREG(status.st_mode):
                    self._leave_out("pipes and devices", member)
                elif self._is_image(member):
                    yield member, status.st_size if status else 0  # a broken link: reading it will raise the error

    def read(self, member: str, limit: int = -1) -> bytes:
        """Content of an image file, or its first `limit` bytes."""
        return _read_file(self.root / member, limit)

    def dataset_json(self, folder: Sequence[str]) -> bytes | None:
        """Content of the ``dataset.json`` in a folder below the root, if any."""
        file = self.root.joinpath(*folder, DATASET_JSON)
        return _read_file(file, -1) if file.is_file() else None


class FileListSource(Source):
    """Files with any names anywhere; a file's path is its member."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__("")
        self.paths = paths

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the path and the size in bytes of each file."""
        return ((path, _file_size(Path(path))) for path in self.paths)

    def read(self, member: str, limit: int = -1) -> bytes:
        """Content of a file, or its first `limit` bytes."""
        return _read_file(Path(member), limit)


class ZipSource(Source):
    """A zip of images."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name)
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._state: tuple[int, int, int] | None = None
        """Of the file, once it has been open."""
        self._infos: dict[str, zipfile.ZipInfo] = {}
        """Its members by name, once it is open."""

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the name and the size in bytes of each image."""
        try:
            self._archive()
        except (OSError, *ARCHIVE_ERRORS) as error:
            raise InputError(f"cannot list {self.name}: {error}") from error
        for name, info in self._infos.items():
            if name.endswith("/"):
                if not _is_hidden(name):
                    self.folders.add(name.rstrip("/"))
            elif self._is_image(name):
                if info.flag_bits & 1:
                    raise InputError(f"{self.name} is encrypted; expected a zip without a password")
                yield name, info.file_size
        unsure = [name for name, info in self._infos.items() if _zip_name(info) is None]
        if unsure:
            self.remarks.append(
                f"{len(unsure)} names are of an unknown code page, and read as code page 437: {unsure[0]} is the first"
            )

    def read(self, member: str, limit: int = -1) -> bytes:
        """Content of an image file, or its first `limit` bytes."""
        archive = self._archive()
        if limit < 0:
            _check_size(self._infos[member].file_size)
        with archive.open(self._infos[member]) as file:
            return file.read(limit)

    def dataset_json(self, folder: Sequence[str]) -> bytes | None:
        """Content of the ``dataset.json`` in a folder of the zip, if any."""
        return next((self.read(name) for name in self._infos if path_parts(name) == [*folder, DATASET_JSON]), None)

    def _archive(self) -> zipfile.ZipFile:
        """The zip as opened by this very process: a forked one would share its parent's file position."""
        if self._opened is None or self._opened[0] != os.getpid():
            archive = zipfile.ZipFile(self.path)
            assert archive.fp is not None
            state = file_state(archive.fp.fileno())
            if self._state not in (None, state):
                raise ValueError(_CHANGED)
            self._opened, self._state = (os.getpid(), archive), state
            self._infos = {_zip_name(info) or info.filename: info for info in self._opened[1].infolist()}
        return self._opened[1]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": None, "_infos": {}}


def _zip_name(info: zipfile.ZipInfo) -> str | None:
    """The name of a zip's member; None where neither a flag nor an extra field nor its bytes tell its code page.

    Without a flag names are in the code page of the system that wrote them, and zipfile reads all as IBM's 437.
    """
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    stored = info.orig_filename.encode("cp437")
    extra = info.extra
    while len(extra) >= 4:
        kind, size = unpack("<HH", extra[:4])
        if kind == 0x7075 and size > 5 and unpack("<I", extra[5:9])[0] == zlib.crc32(stored):  # the Unicode path
            return extra[9 : 4 + size].decode(errors="replace")
        extra = extra[4 + size :]
    with suppress(UnicodeDecodeError):
        return stored.decode()
    return None


class TarSource(Source):
    """A tar of images; as in WebDataset, files of one name and other endings describe them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name)
        self.path = path
        self._spans: dict[str, tuple[int, int]] = {}
        """Offset and size in bytes of each file, once it has been listed."""
        self._state: tuple[int, int, int] | None = None
        """Of the tar, once it has been listed."""

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the stored name and the size in bytes of each image, having read through the tar."""
        try:
            with self.path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                self._state = file_state(file.fileno())
                while info := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every one of them
                    if info.isfile():
                        self._spans[info.name] = info.offset_data, info.size
                    elif info.isdir() and not _is_hidden(info.name):
                        self.folders.add(info.name)
        except (OSError, tarfile.TarError) as error:
            raise InputError(f"cannot list {self.name}: {error}") from error
        return ((name, size) for name, (_, size) in self._spans.items() if self._is_image(name))

    def read(self, member: str, limit: int = -1) -> bytes:
        """Content of a file, or its first `limit` bytes."""
        start, size = self._spans[member]
        if limit < 0:
            _check_size(size)
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(size if limit < 0 else min(size, limit))
            if file_state(file.fileno()) != self._state:
                raise ValueError(_CHANGED)
            return content

    def sidecar(self, member: str, suffix: str) -> bytes | None:
        """Content of the file with this suffix in the same sample; its name ends at the first dot."""
        folder, _, name = member.rpartition("/")
        sibling = f"{folder}/{name.partition('.')[0]}.{suffix}".lstrip("/")
        return self.read(sibling) if sibling in self._spans else None

    def dataset_json(self, folder: Sequence[str]) -> bytes | None:
        """Content of the ``dataset.json`` in a folder of the tar, if any."""
        return next((self.read(name) for name in self._spans if path_parts(name) == [*folder, DATASET_JSON]), None)


class NpzSource(Source):
    """The images in the `arr_0` of an .npz, as samplers and FID toolkits exchange them; each is read as a PPM.

    Images of `var sample` have the names they would have in a folder. Others have none: a digest of
    the pixels takes its place, so that their order does not depend on how the array was shuffled.
    """

    def __init__(self, path: Path) -> None:
        """Open an .npz; images without names are each read once for their digests.

        Raises:
            InputError: it has no such array.
        """
        super().__init__(path.name)
        self.path = path
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as stored:
                self._state = file_state(file.fileno())
                self._shape, self._start = _pixels_shape(stored)[0], _pixels_start(file, stored)
                self._unpacked_NHW3 = _unpacked(stored) if self._start is None else None
                _check_bytes(stored)
                self._provenances = npz_provenances(stored, path)
                self._labels = None if self._provenances else self._stored_labels(stored, self._shape[0])
            names = [image_filename(each) for each in self._provenances] or self._digests()
        except (OSError, *ARCHIVE_ERRORS) as error:
            reason = "it has no arr_0" if isinstance(error, KeyError) else error
            raise InputError(
                f"cannot read images from {path}: {reason}; expected arr_0, uint8 (images, height, width, 3)"
            ) from error
        self._indices = {name: i for i, name in enumerate(names)}

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the name and the size in bytes of each image."""
        return ((name, prod(self._shape[1:])) for name in self._indices)

    def read(self, member: str, limit: int = -1) -> bytes:
        """An image as a PPM file's content, or its first `limit` bytes.

        Raises:
            ValueError: the file has been changed since it was opened.
        """
        _, height, width, _ = self._shape
        header = b"P6 %d %d 255\n" % (width, height)
        whole = limit < 0 or limit > len(header)
        content = header + (self._images(self._indices[member], 1).tobytes() if whole else b"")
        return content if limit < 0 else content[:limit]

    def _images(self, first: int, count: int) -> NDArray[np.uint8]:
        """Images of the array by their places in it, (count, H, W, 3); fewer at its end.

        They are read and not mapped from the file: one that is cut off meanwhile would end the process.

        Raises:
            ValueError: the file has been changed since it was opened.
        """
        with self.path.open("rb") as file:
            content = b""
            if self._start is not None:
                file.seek(self._start + first * prod(self._shape[1:]))
                content = file.read(min(count, self._shape[0] - first) * prod(self._shape[1:]))
            if file_state(file.fileno()) != self._state:
                raise ValueError(_CHANGED)
        if self._unpacked_NHW3 is not None:
            return self._unpacked_NHW3[first : first + count]
        return np.frombuffer(content, np.uint8).reshape(-1, *self._shape[1:])

    def _digests(self) -> list[str]:
        """A digest of each image that takes the place of its name; equal images are counted."""
        block = max(1, _DIGESTED // prod(self._shape[1:]))

        def digests(first: int) -> list[str]:
            part_NHW3 = np.ascontiguousarray(self._images(first, block))
            return [
                blake2b(pixels.data, digest_size=16).hexdigest() for pixels in part_NHW3.reshape(len(part_NHW3), -1)
            ]

        seen: Counter[str] = Counter()
        names = []
        with ThreadPoolExecutor() as pool:
            for digest in chain.from_iterable(pool.map(digests, range(0, self._shape[0], block))):
                names.append(f"{digest}-{seen[digest]}")
                seen[digest] += 1
        return names

    def sidecar(self, member: str, suffix: str) -> bytes | None:
        """The provenance of an image as "json", or its number in `arr_1` as "cls"."""
        i = self._indices[member]
        if suffix == "json" and self._provenances:
            return self._provenances[i].to_json().encode()
        if suffix == "cls" and self._labels is not None:
            return b"%d" % self._labels[i]
        return None

    def _stored_labels(self, stored: zipfile.ZipFile, count: int) -> NDArray[np.integer] | None:
        """The integers in `arr_1`, one per image; None if it holds anything else, which is counted in `left_out`."""
        if LABELS not in stored.namelist():
            return None
        with stored.open(LABELS) as member:
            shape, _, dtype = array_header(member)
        if shape != (count,) or not np.issubdtype(dtype, np.integer):
            self._leave_out(f"arrays that are no labels, which would be integers ({count},)", f"arr_1 {dtype} {shape}")
            return None
        with stored.open(LABELS) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_unpacked_NHW3": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if self._start is None:
            with zipfile.ZipFile(self.path) as stored:
                self._unpacked_NHW3 = _unpacked(stored)


# --- files -------------------------------------------------------------------------------------------


def path_parts(member: str) -> list[str]:
    """Folders and file name of a path inside a source, whichever system wrote it."""
    return [part for part in member.replace("\\", "/").split("/") if part not in ("", ".")]


def _is_hidden(member: str) -> bool:
    """True for a path that is hidden, or of what systems keep beside images: macOS's metadata, thumbnails, bins."""
    parts = path_parts(member)
    return any(part.startswith(".") or part in ("__MACOSX", "@eaDir", "$RECYCLE.BIN") for part in parts)


def _is_training_run(entries: Sequence[os.DirEntry[str]]) -> bool:
    """Whether a folder is one that `var train` writes, finished or just begun."""
    names = {entry.name for entry in entries}
    return bool(names & _RUN_FILES) or any(re.fullmatch(r"tokens-[0-9a-f]{16}", name) for name in names)


def _status(entry: "os.DirEntry[str]") -> os.stat_result | None:
    """What is at a path or behind the link there; None for a link that leads nowhere."""
    try:
        return entry.stat()
    except OSError:
        return None


def _file_size(path: Path) -> int:
    """Size of a file in bytes, 0 for a broken link: reading it will raise the error."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_file(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        if limit < 0:
            _check_size(os.fstat(file.fileno()).st_size)
        return file.read(limit)


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"its file is {size / 2**30:.1f} GiB; at most {MOST_BYTES >> 30} GiB is read")


# --- arrays of an .npz -------------------------------------------------------------------------------

PIXELS, LABELS, PROVENANCE = "arr_0.npy", "arr_1.npy", "provenance.jsonl"


MOST_IMAGES = 2_000_000
"""Most images in an .npz; a few kilobytes could decompress to any number of one pixel each."""


def square_side(path: Path) -> int | None:
    """Side in pixels of the images in an .npz; None if it has none or they are not square."""
    with zipfile.ZipFile(path) as stored:
        try:
            (_, height, width, _), _, _ = _pixels_shape(stored)
        except (KeyError, ValueError):
            return None
    return height if height == width else None


def _pixels_start(file: IO[bytes], stored: zipfile.ZipFile) -> int | None:
    """Offset in an .npz of the first image, from which all lie one after the other; None if they must be unpacked."""
    _, order, start = _pixels_shape(stored)
    info = stored.getinfo(PIXELS)
    if info.compress_type != zipfile.ZIP_STORED or order != "C":
        return None
    file.seek(info.header_offset + 26)
    return info.header_offset + 30 + sum(unpack("<HH", file.read(4))) + start  # after a header, a name, an extra field


def _unpacked(stored: zipfile.ZipFile) -> NDArray[np.uint8]:
    """The array of images, mapped from a temporary file of our own."""
    shape, order, start = _pixels_shape(stored)
    with TemporaryFile() as unpacked, stored.open(PIXELS) as member:
        shutil.copyfileobj(member, unpacked, 1 << 20)
        return np.memmap(unpacked, np.uint8, "r", start, shape, order)


def _pixels_shape(stored: zipfile.ZipFile) -> tuple[tuple[int, ...], Literal["C", "F"], int]:
    """Shape and order of the array of images, and the offset of the pixels inside its .npy.

    Raises:
        ValueError: it is not of images, another array holds images too, or the file does not hold all of it.
    """
    with stored.open(PIXELS) as member:
        shape, fortran_order, dtype = array_header(member)
        start = member.tell()
    if not _holds_images(shape, dtype):
        raise ValueError(f"its arr_0 is {dtype} {shape}")
    if shape[0] > MOST_IMAGES:
        raise ValueError(f"its arr_0 is {dtype} {shape}, and at most {MOST_IMAGES} images are read from one file")
    held = stored.getinfo(PIXELS).file_size - start
    if held != prod(shape):
        raise ValueError(f"its arr_0 is {dtype} {shape}, {prod(shape)} bytes, but the file holds {held} of them")
    others = [name.removesuffix(".npy") for name in stored.namelist() if name != PIXELS and _is_of_images(stored, name)]
    if others:
        raise ValueError(f"{' and '.join(others)} has images too; numpy.concatenate makes one array of all")
    return shape, "F" if fortran_order else "C", start


def _is_of_images(stored: zipfile.ZipFile, name: str) -> bool:
    """Whether a member of an .npz is an array of images."""
    with suppress(ValueError), stored.open(name) as member:
        shape, _, dtype = array_header(member)
        return _holds_images(shape, dtype)
    return False


def _holds_images(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    return dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and min(shape) > 0


def array_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type of the array in a .npy.

    Raises:
        ValueError: it has no such header.
    """
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return read(member)
    except (ValueError, TokenError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("an array without a header that can be read") from error


def _check_bytes(stored: zipfile.ZipFile) -> None:
    """Read the array of images once through, for zipfile to compare its checksum: pixels are mapped unchecked.

    A compressed array has been checked as it was unpacked.
    """
    if stored.getinfo(PIXELS).compress_type == zipfile.ZIP_STORED:
        with stored.open(PIXELS) as member:
            while member.read(1 << 20):
                pass


def npz_provenances(stored: zipfile.ZipFile, path: Path) -> list[Provenance]:
    """The provenance of each image in the .npz at `path`; empty for a file that `var sample` did not write.

    Raises:
        InputError: one is damaged.
        ValueError: they are far too long for so many images, or there are no images; also the other ARCHIVE_ERRORS.
    """
    if PROVENANCE not in stored.namelist():
        return []
    (count, *_), _, _ = _pixels_shape(stored)
    held = stored.getinfo(PROVENANCE).file_size
    if held > min(count * _LONGEST_PROVENANCE, MOST_BYTES):
        raise ValueError(f"its {PROVENANCE} has {held} bytes for {count} images")
    lines = stored.read(PROVENANCE).splitlines()
    return [provenance_from_json(line, str(path)) for line in lines] if len(lines) == count else []


_LONGEST_PROVENANCE = 1 << 16
"""Most bytes of an image's provenance in an .npz; it has some 600."""


_DIGESTED = 1 << 22
"""Bytes of images whose digests a thread computes at a time."""
