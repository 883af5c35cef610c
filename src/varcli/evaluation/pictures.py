"""Pictures to measure, or to measure against, in one order, of one size.

Opening reads names and headers only, so that what is unreadable or of another size shows before long
work begins. Pixels are decoded as they are asked for.

Shapes: B pictures of P × P pixels.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from varcli.data.datasets import UnreadablePicture, decode_picture, reading_picture
from varcli.errors import InputError
from varcli.evaluation.labelling import rows_of
from varcli.evaluation.listing import Listed, in_words, list_pictures, look
from varcli.evaluation.resizing import center_crop

Pixels = NDArray[np.uint8]

_AHEAD = 2
"""Batches being read while one is worked on."""


class PictureList:
    """Pictures of one size in their canonical order, that of their names: picture i has rank i.

    The order is that of the paths as text, as torch-fidelity takes files, in whatever order they were found.
    """

    def __init__(
        self, pictures: Sequence[Listed], resize: int | None, skip_bad: bool = False, skipped: Sequence[str] = ()
    ) -> None:
        self._pictures = pictures
        self._resize = resize
        self._skip_bad = skip_bad
        self.skipped = list(skipped)
        """Names of pictures that could not be read and were passed over, so far."""
        self.classes, self.rows = rows_of([picture.label for picture in self._pictures])
        """The classes there are, and for each picture its row among them, -1 where it has none."""
        self.jpegs = sum(picture.format in ("JPEG", "MPO") for picture in pictures)
        """How many are JPEG files."""
        self.side = resize or self._common_side()
        """Pixels along each side of what is measured."""

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def names(self) -> list[str]:
        """What to call each picture."""
        return [picture.name for picture in self._pictures]

    def class_counts(self) -> list[int]:
        """Return how many pictures each class has."""
        counts = Counter(self.rows)
        return [counts[row] for row in range(len(self.classes))]

    def pixels(self, i: int) -> Pixels:
        """Return picture i as uint8 (P, P, 3).

        Raises:
            UnreadablePicture: it cannot be read or decoded.
        """
        picture = self._pictures[i]
        with reading_picture(picture.name):
            image = decode_picture(picture.source.read(picture.member), picture.name)
        return np.asarray(image) if self._resize is None else center_crop(image, self._resize)

    def batches(self, ranks: Iterable[int], size: int) -> Iterator[tuple[list[int], Pixels, list[int]]]:
        """Yield up to `size` pictures at a time: their ranks, pixels (B, P, P, 3) and classes' rows.

        Some are read ahead while one batch is at work. Bad ones that are passed over are missing in it, and named
        in `skipped`.

        Raises:
            UnreadablePicture: one cannot be decoded.
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
        """Return the pictures of a batch that could be read."""
        read = {}
        for i, reading in batch.items():
            try:
                read[i] = reading.result()
            except UnreadablePicture as error:
                if not self._skip_bad:
                    raise
                self.skipped.append(error.name)
        return read

    def fingerprint(self) -> str:
        """Return a sha256 by which a run knows its pictures again, wherever they have been moved.

        Over each one's name, length and first bytes, and how they are resized: reading them all would take too long.
        """
        digest = sha256(f"{self._resize}\n".encode())
        for picture in self._pictures:
            digest.update(f"{picture.name}\t{picture.length}\t".encode(errors="surrogatepass") + picture.digest + b"\n")
        return digest.hexdigest()

    def _common_side(self) -> int:
        """Return the side of all pictures.

        Raises:
            InputError: one is no square, or not of the size that most have.
        """
        ((usual, _), *_) = Counter(picture.size for picture in self._pictures).most_common(1)
        odd = [picture for picture in self._pictures if len({*picture.size, *usual}) > 1]
        if odd:
            most = f", most are {_by(usual)}" if odd[0].size != usual else ""
            raise InputError(
                f"pictures: {odd[0].name} is {_by(odd[0].size)} pixels{most}; squares of one size, "
                "or --resize SIDE to crop and resize as ADM does"
            )
        return usual[0]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def open_pictures(
    paths: Sequence[str | Path], *, resize: int | None = None, skip_bad: bool = False, lines: Iterable[str] = ()
) -> PictureList:
    """Return the pictures of folders, zips, .npz, WebDataset .tar and files, all together.

    Args:
        paths: where they lie; ``-`` stands for one path a line of `lines`.
        resize: the side to which each is cropped and resized; None takes squares of one size as they are.
        skip_bad: pass over what cannot be read, rather than end there.
        lines: standard input.

    Raises:
        InputError: a path cannot be opened or is given twice, there are no pictures, some cannot be read, or they are
            of several sizes.
    """
    listed = list_pictures(paths, lines)
    looked = [look(picture) for picture in listed]
    good = [picture for picture in looked if isinstance(picture, Listed)]
    bad = [picture for picture in looked if isinstance(picture, UnreadablePicture)]
    if bad and not (skip_bad and good):
        reasons = in_words([f"{error.name} ({error.reason})" for error in bad])
        advice = "mend or remove them, or pass over them with --skip-bad"
        raise InputError(f"pictures: {len(bad)} of {len(listed)} cannot be read, {reasons}; {advice}")
    return PictureList(good, resize, skip_bad, [error.name for error in bad])
