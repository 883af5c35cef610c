"""Where images are stored: a folder, a zip, tar or .npz read without unpacking, or a list of files.

A source may be read by several threads at once, and it pickles: each process opens its archive for itself.

Shapes: N images of H × W pixels.
"""

import os
import shutil
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from struct import unpack
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from varcli.errors import InputError
from varcli.images.provenance import Provenance, image_filename, provenance_from_json

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
"""File name endings taken for images; everything else in a data set is ignored."""


class Source(ABC):
    """A store of image files, each known by its path inside."""

    name: str
    """Its name in messages, without the folders above it."""

    @abstractmethod
    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the path and the size in bytes of each image.

        Raises:
            InputError: it cannot be listed.
        """

    @abstractmethod
    def read(self, member: str, limit: int = -1) -> bytes:
        """Content of an image file, or its first `limit` bytes."""

    def sidecar(self, member: str, suffix: str) -> bytes | None:
        """Content of the file that describes an image, such as its "cls" or "json"; None if there is none."""
        return None


def open_source(path: Path) -> Source | None:
    """Folder or archive at a path; None for any other file.

    Raises:
        InputError: there is nothing at this path, or an .npz has no images.
    """
    try:
        if path.is_dir():
            return FolderSource(path)
        path.stat()
    except OSError as error:
        raise InputError(f"cannot open {path}: {error.strerror or error}") from error
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return NpzSource(path)
    if suffix == ".tar":
        return TarSource(path)
    if suffix == ".zip" or (suffix not in IMAGE_SUFFIXES and zipfile.is_zipfile(path)):
        return ZipSource(path)
    return None


class FolderSource(Source):
    """A folder and all folders below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = root.resolve().name

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the path below the root, with forward slashes, and the size in bytes of each image."""
        for folder, _, names in os.walk(self.root, followlinks=True, onerror=self._not_listed):
            inside = Path(folder).relative_to(self.root)
            for member in (inside / name for name in names):
                if _is_image(member.as_posix()):
                    yield member.as_posix(), _file_size(self.root / member)

    def read(self, member: str, limit: int = -1) -> bytes:
        """Content of an image file, or its first `limit` bytes."""
        return _read_file(self.root / member, limit)

    def _not_listed(self, error: OSError) -> None:
        """Stop `os.walk` at a folder that cannot be listed, which it would skip in silence."""
        raise InputError(f"cannot list {self.name}: {error}") from error


class FileListSource(Source):
    """Files with any names anywhere; a file's path is its member."""

    name = ""

    def __init__(self, paths: Sequence[str]) -> None:
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
        self.path = path
        self.name = path.name
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the stored name and the size in bytes of each image."""
        try:
            stored = self._archive().infolist()
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"cannot list {self.name}: {error}") from error
        return ((info.filename, info.file_size) for info in stored if _is_image(info.filename))

    def read(self, member: str, limit: int = -1) -> bytes:
        """Content of an image file, or its first `limit` bytes."""
        with self._archive().open(member) as file:
            return file.read(limit)

    def _archive(self) -> zipfile.ZipFile:
        """The zip as opened by this very process: a forked one would share its parent's file position."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": None}


class TarSource(Source):
    """A tar of images; as in WebDataset, files of one name and other endings describe them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self._spans: dict[str, tuple[int, int]] = {}
        """Offset and size in bytes of each file, once it has been listed."""

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the stored name and the size in bytes of each image, having read through the tar."""
        try:
            with tarfile.open(self.path, "r:") as tar:
                while info := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every one of them
                    if info.isfile():
                        self._spans[info.name] = info.offset_data, info.size
        except (OSError, tarfile.TarError) as error:
            raise InputError(f"cannot list {self.name}: {error}") from error
        return ((name, size) for name, (_, size) in self._spans.items() if _is_image(name))

    def read(self, member: str, limit: int = -1) -> bytes:
        """Content of a file, or its first `limit` bytes."""
        start, size = self._spans[member]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(size if limit < 0 else min(size, limit))

    def sidecar(self, member: str, suffix: str) -> bytes | None:
        """Content of the file with this suffix in the same sample; its name ends at the first dot."""
        folder, _, name = member.rpartition("/")
        sibling = f"{folder}/{name.partition('.')[0]}.{suffix}".lstrip("/")
        return self.read(sibling) if sibling in self._spans else None


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
        self.path = path
        self.name = path.name
        try:
            with zipfile.ZipFile(path) as stored:
                self._pixels_NHW3 = _map_pixels(path, stored)
                self._provenances = _provenances(stored, path, len(self._pixels_NHW3))
                self._labels = None if self._provenances else _stored_labels(stored, len(self._pixels_NHW3))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(
                f"cannot read images from {path}: {error}; expected arr_0, uint8 (images, height, width, 3)"
            ) from error
        names = [image_filename(each) for each in self._provenances] or _digests(self._pixels_NHW3)
        self._indices = {name: i for i, name in enumerate(names)}

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the name and the size in bytes of each image."""
        return ((name, self._pixels_NHW3[0].nbytes) for name in self._indices)

    def read(self, member: str, limit: int = -1) -> bytes:
        """An image as a PPM file's content, or its first `limit` bytes."""
        pixels_HW3 = self._pixels_NHW3[self._indices[member]]
        height, width, _ = pixels_HW3.shape
        header = b"P6 %d %d 255\n" % (width, height)
        return header + pixels_HW3.tobytes() if limit < 0 else (header + pixels_HW3.ravel()[:limit].tobytes())[:limit]

    def sidecar(self, member: str, suffix: str) -> bytes | None:
        """The provenance of an image as "json", or its number in `arr_1` as "cls"."""
        i = self._indices[member]
        if suffix == "json" and self._provenances:
            return self._provenances[i].to_json().encode()
        if suffix == "cls" and self._labels is not None:
            return b"%d" % self._labels[i]
        return None

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_pixels_NHW3"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        with zipfile.ZipFile(self.path) as stored:
            self._pixels_NHW3 = _map_pixels(self.path, stored)


# --- files -------------------------------------------------------------------------------------------


def path_parts(member: str) -> list[str]:
    """Folders and file name of a path inside a source, whichever system wrote it."""
    return [part for part in member.replace("\\", "/").split("/") if part not in ("", ".")]


def _is_image(member: str) -> bool:
    """True for the path of an image that is not hidden and not macOS's metadata of one."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path_parts(member))
    return not hidden and member.lower().endswith(IMAGE_SUFFIXES)


def _file_size(path: Path) -> int:
    """Size of a file in bytes, 0 for a broken link: reading it will raise the error."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_file(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit)


# --- arrays of an .npz -------------------------------------------------------------------------------

PIXELS, LABELS, PROVENANCE = "arr_0.npy", "arr_1.npy", "provenance.jsonl"


def square_side(path: Path) -> int | None:
    """Side in pixels of the images in an .npz; None if it has none or they are not square."""
    with zipfile.ZipFile(path) as stored:
        try:
            (_, height, width, _), _ = _pixels_shape(stored)
        except (KeyError, ValueError):
            return None
    return height if height == width else None


def _map_pixels(path: Path, stored: zipfile.ZipFile) -> NDArray[np.uint8]:
    """The array of images mapped from the file; a compressed one is unpacked to a temporary file first."""
    shape, start = _pixels_shape(stored)
    info = stored.getinfo(PIXELS)
    if info.compress_type == zipfile.ZIP_STORED:
        return np.memmap(path, np.uint8, "r", _data_offset(path, info) + start, shape)
    with TemporaryFile() as unpacked, stored.open(info) as member:
        shutil.copyfileobj(member, unpacked, 1 << 20)
        return np.memmap(unpacked, np.uint8, "r", start, shape)


def _pixels_shape(stored: zipfile.ZipFile) -> tuple[tuple[int, ...], int]:
    """Shape of the array of images, and the offset of the pixels inside its .npy."""
    with stored.open(PIXELS) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(member)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or 0 in shape:
            raise ValueError(f"its arr_0 is {dtype} {shape}")
        return shape, member.tell()


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Offset of a stored member's bytes in a zip: after its header, its name and an extra field."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        return info.header_offset + 30 + sum(unpack("<HH", file.read(4)))


def _provenances(stored: zipfile.ZipFile, path: Path, count: int) -> list[Provenance]:
    """The provenance of each image; empty for a file that `var sample` did not write."""
    lines = stored.read(PROVENANCE).decode().splitlines() if PROVENANCE in stored.namelist() else []
    return [provenance_from_json(line, str(path)) for line in lines] if len(lines) == count else []


def _stored_labels(stored: zipfile.ZipFile, count: int) -> NDArray[np.integer] | None:
    """The integers in `arr_1`, one per image; None if it holds anything else."""
    if LABELS in stored.namelist():
        with stored.open(LABELS) as member:
            labels = np.lib.format.read_array(member, allow_pickle=False)
        if labels.shape == (count,) and np.issubdtype(labels.dtype, np.integer):
            return labels
    return None


def _digests(pixels_NHW3: NDArray[np.uint8]) -> list[str]:
    """A digest of each image that takes the place of its name; equal images are counted."""
    seen: Counter[str] = Counter()
    names = []
    with ThreadPoolExecutor() as pool:
        flat = pixels_NHW3.reshape(len(pixels_NHW3), -1)
        for digest in pool.map(lambda pixels: blake2b(pixels, digest_size=16).hexdigest(), flat):
            names.append(f"{digest}-{seen[digest]}")
            seen[digest] += 1
    return names
