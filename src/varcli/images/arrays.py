"""Images in the `arr_0` of an .npz, as samplers and FID toolkits exchange them, read in place.

Shapes: N images of H × W pixels.
"""

import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from struct import unpack
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from varcli.classes import ClassEntry
from varcli.errors import InputError
from varcli.images.labels import entry_of, numbered
from varcli.images.provenance import Provenance, image_filename, provenance_from_json

PIXELS, LABELS, PROVENANCE = "arr_0.npy", "arr_1.npy", "provenance.jsonl"


class NpzSource:
    """The images of an .npz; each is read as the file it could be, a PPM.

    Images of `var sample` bear the names they would have in a folder. Others have none: a digest of
    their pixels stands for it, so that their order does not depend on how the array was shuffled.
    """

    def __init__(self, path: Path) -> None:
        """Open an .npz; of images without names each is read once for its digest.

        Raises:
            InputError: it has no such array.
        """
        self.label = path.name
        try:
            with zipfile.ZipFile(path) as stored:
                self._pixels_NHW3 = _mapped(path, stored)
                made = _provenances(stored, path, len(self._pixels_NHW3))
                entries = [_entry_made(each) for each in made] or _labels(stored, len(self._pixels_NHW3))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(
                f"images: {path}; {error}; an .npz with arr_0, uint8 (images, height, width, 3)"
            ) from error
        self._names = [image_filename(each) for each in made] or _digests(self._pixels_NHW3)
        self._places = {name: i for i, name in enumerate(self._names)}
        self._entries = entries

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield the name and size in bytes of each image."""
        return ((name, self._pixels_NHW3[0].nbytes) for name in self._names)

    def read(self, member: str, most: int = -1) -> bytes:
        """Return an image as a PPM, or its beginning."""
        pixels_HW3 = self._pixels_NHW3[self._places[member]]
        height, width, _ = pixels_HW3.shape
        header = b"P6 %d %d 255\n" % (width, height)
        return header + pixels_HW3.tobytes() if most < 0 else (header + pixels_HW3.ravel()[:most].tobytes())[:most]

    def entry(self, member: str) -> ClassEntry | None:
        """Return the class of an image, as its provenance or the labels in `arr_1` have it."""
        return self._entries[self._places[member]]


def square_side(path: Path) -> int | None:
    """Return the side of the images in an .npz, None where it has none or they are no squares."""
    with zipfile.ZipFile(path) as stored:
        try:
            (_, height, width, _), _ = _shape(stored)
        except (KeyError, ValueError):
            return None
    return height if height == width else None


def _mapped(path: Path, stored: zipfile.ZipFile) -> NDArray[np.uint8]:
    """Return the array of images as it lies in the file; what is compressed is unpacked beside it first."""
    shape, start = _shape(stored)
    info = stored.getinfo(PIXELS)
    if info.compress_type == zipfile.ZIP_STORED:
        return np.memmap(path, np.uint8, "r", _data_offset(path, info) + start, shape)
    with TemporaryFile() as unpacked, stored.open(info) as member:
        shutil.copyfileobj(member, unpacked, 1 << 20)
        return np.memmap(unpacked, np.uint8, "r", start, shape)


def _shape(stored: zipfile.ZipFile) -> tuple[tuple[int, ...], int]:
    """Return the shape of the array of images, and where in its .npy the pixels begin."""
    with stored.open(PIXELS) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, reversed_order, dtype = read(member)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or reversed_order or 0 in shape:
            raise ValueError(f"its arr_0 is {dtype} {shape}")
        return shape, member.tell()


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return where in a zip the bytes of a stored member begin: behind its header, its name and an extra field."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        return info.header_offset + 30 + sum(unpack("<HH", file.read(4)))


def _provenances(stored: zipfile.ZipFile, path: Path, count: int) -> list[Provenance]:
    """Return how each image was made, nothing where the file is not of `var sample`."""
    lines = stored.read(PROVENANCE).decode().splitlines() if PROVENANCE in stored.namelist() else []
    return [provenance_from_json(line, str(path)) for line in lines] if len(lines) == count else []


def _entry_made(made: Provenance) -> ClassEntry | None:
    return None if made.class_id is None else entry_of(made.class_id, made.class_name)


def _labels(stored: zipfile.ZipFile, count: int) -> list[ClassEntry | None]:
    """Return the classes that whole numbers in `arr_1` stand for."""
    if LABELS in stored.namelist():
        with stored.open(LABELS) as member:
            labels = np.lib.format.read_array(member, allow_pickle=False)
        if labels.shape == (count,) and np.issubdtype(labels.dtype, np.integer):
            return [numbered(int(label)) for label in labels]
    return [None] * count


def _digests(pixels_NHW3: NDArray[np.uint8]) -> list[str]:
    """Return for each image what stands for its name; equal ones are counted."""
    rows = pixels_NHW3.reshape(len(pixels_NHW3), -1)
    seen: Counter[str] = Counter()
    names = []
    with ThreadPoolExecutor() as pool:
        for digest in pool.map(lambda row: blake2b(row, digest_size=16).hexdigest(), rows):
            names.append(f"{digest}-{seen[digest]}")
            seen[digest] += 1
    return names
