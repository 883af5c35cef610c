"""Pictures to train on: folders of class folders, and zips of one, read without unpacking.

Opening lists names only; no pixel is decoded before it is asked for. A set may be handed to worker
processes: it pickles, and each process opens the zips for itself.
"""

import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from varcli.data.classes import ClassEntry, ClassTable, imagenet
from varcli.data.sources import Folder, Source, Zip, path_parts
from varcli.errors import InputError, UsageError


class UnreadablePicture(InputError):  # noqa: N818 - what it is, said by its name
    """A picture that cannot be decoded."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"picture: {name} cannot be read; {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type["UnreadablePicture"], tuple[str, str]]:  # workers hand it to their parent
        return UnreadablePicture, (self.name, self.reason)


# --- decoding --------------------------------------------------------------------------------------


def decode_picture(data: bytes, name: str) -> Image.Image:
    """Return a picture file's content as RGB, upright as its camera meant it, its first frame.

    Sixteen-bit greys are brought to eight; whatever is transparent shows white.

    Raises:
        UnreadablePicture: the bytes are no picture, or are broken or cut off.
    """
    with reading_picture(name), Image.open(BytesIO(data)) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def reading_picture(name: str) -> Iterator[None]:
    """Turn whatever goes wrong while a picture is read or decoded into `UnreadablePicture`."""
    try:
        yield
    except (MemoryError, UnreadablePicture):
        raise
    except Exception as error:  # decoders fed broken bytes raise nearly anything, struct.error to SyntaxError
        reason = "no picture, or of a kind not known" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadablePicture(name, reason or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, also where held in 32
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def square_crop(
    image: Image.Image, pixels: int, enlarge: float = 1.0, corner: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Return a square of a picture as uint8 (pixels, pixels, 3).

    Args:
        image: an RGB picture.
        pixels: side of the square.
        enlarge: the shorter side is first brought to this many times `pixels`, by Lanczos.
        corner: left and top edge of the square as shares in [0, 1] of the room there is; None is the centre.

    Source: section 4 of the paper's released recipe: 1.125 times the size, then a random crop.
    """
    short = round(pixels * enlarge)
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (round(share * (side - pixels)) for share, side in zip(corner or (0.5, 0.5), image.size, strict=True))
    return np.asarray(image.crop((left, top, left + pixels, top + pixels)))


# --- the set ---------------------------------------------------------------------------------------


class _Picture(NamedTuple):
    source: int
    member: str
    row: int
    size: int


class PictureSet:
    """Pictures with their classes, in order of class and then the natural order of file names."""

    def __init__(self, classes: ClassTable, sources: Sequence[Source], pictures: Sequence[_Picture]) -> None:
        self.classes = classes
        self.rows = [picture.row for picture in pictures]
        self._sources = sources
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, i: int) -> str:
        """Return what to call picture i in a message, e.g. ``train-0.zip/n01443537/n01443537_0.JPEG``."""
        picture = self._pictures[i]
        return f"{self._sources[picture.source].label}/{picture.member}"

    def read(self, i: int) -> Image.Image:
        """Return picture i as RGB.

        Raises:
            UnreadablePicture: it cannot be read or decoded.
        """
        picture = self._pictures[i]
        with reading_picture(self.name(i)):
            return decode_picture(self._sources[picture.source].read(picture.member), self.name(i))

    def subset(self, indices: Iterable[int]) -> "PictureSet":
        """Return a set of these pictures, with the same classes."""
        return PictureSet(self.classes, self._sources, [self._pictures[i] for i in indices])

    def split(self, holdout: int) -> tuple["PictureSet", "PictureSet"]:
        """Return the pictures to train on, and the last `holdout` of each class to validate on.

        Raises:
            UsageError: `holdout` is negative or leaves a class nothing to train on.
        """
        left = Counter(self.rows)
        if holdout < 0 or holdout >= min(left.values(), default=holdout + 1):
            fewest = ", ".join(f"{self.classes.entries[row].name} has {n}" for row, n in left.most_common()[-1:])
            raise UsageError(f"holdout: {holdout}; 0 or more, and fewer than any class has pictures ({fewest})")
        training: list[int] = []
        held_out: list[int] = []
        for i, row in enumerate(self.rows):
            (training if left[row] > holdout else held_out).append(i)
            left[row] -= 1
        return self.subset(training), self.subset(held_out)

    def fingerprint(self) -> str:
        """Return a sha256 over classes, names and sizes, the same wherever the files have been moved."""
        digest = sha256(self.classes.to_json().encode())
        for picture in self._pictures:
            digest.update(f"{picture.row}\t{picture.member}\t{picture.size}\n".encode(errors="surrogatepass"))
        return digest.hexdigest()


def open_pictures(paths: Sequence[Path]) -> PictureSet:
    """Return the pictures of folders of class folders, of zips of such a folder, or of several of these.

    Folders of one name are one class wherever they lie. Where all their names are WordNet ids of
    ImageNet, classes have ImageNet's indices; otherwise they are numbered in natural order. A single
    folder around the class folders does no harm.

    Raises:
        InputError: a path cannot be opened, is given twice, or has no class folders with pictures.
    """
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise InputError(f"data: {', '.join(map(str, paths))}; each path once")
    sources = [_source(Path(path)) for path in paths]
    found = [(i, *item) for i, source in enumerate(sources) for item in _classified(source)]
    classes = _class_table({folder for _, folder, *_ in found})
    row_of = {entry.wnid: row for row, entry in enumerate(classes.entries)}
    keyed = sorted((row_of[name], natural_key(rest), member, i, size) for i, name, rest, member, size in found)
    return PictureSet(classes, sources, [_Picture(i, member, row, size) for row, _, member, i, size in keyed])


def natural_key(text: str) -> list[str | int]:
    """Return a key that sorts numbers inside names by value, n1_2 before n1_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", text))]


def _source(path: Path) -> Source:
    try:
        if path.is_dir():
            return Folder(path, path.resolve().name)
        if zipfile.is_zipfile(path):
            return Zip(path, path.name)
        path.stat()
    except OSError as error:
        raise InputError(f"data: {path}; {error.strerror or error}") from error
    raise InputError(f"data: {path}; a folder of class folders, or a zip of one")


def _classified(source: Source) -> list[tuple[str, str, str, int]]:
    """Return class name, path within the class, path within the source and size of each picture."""
    try:
        listed = [(path_parts(member), member, size) for member, size in source.members()]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"data: {source.label} cannot be listed; {error}") from error
    level = class_level([parts for parts, *_ in listed])
    filed = [item for item in listed if len(item[0]) > level + 1]
    if not filed:
        raise InputError(f"data: {source.label} has {len(listed)} pictures and no class folders; one folder a class")
    return [(class_name(parts[level]), "/".join(parts[level + 1 :]), member, size) for parts, member, size in filed]


def class_name(folder: str) -> str:
    """Return a folder's name as text: composed letters, which a Mac takes apart, and no bytes that are no letters."""
    return unicodedata.normalize("NFC", folder.encode(errors="replace").decode())


def class_level(paths: Sequence[Sequence[str]]) -> int:
    """Return how deep the class folders lie: below whatever single folder holds everything.

    A folder of a WordNet id holds no classes, nor does one with more pictures in itself than below.
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
