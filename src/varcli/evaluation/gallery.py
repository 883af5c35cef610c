"""Some of the pictures that are measured, to be looked at in a report."""

from base64 import b64encode
from collections.abc import Iterable, Iterator
from io import BytesIO

import numpy as np
from PIL import Image

from varcli.evaluation.inception import Pixels
from varcli.evaluation.measurement import Batch

SHOWN, THUMBNAIL = 24, 128
"""How many, and the most pixels a side of them."""


class Gallery:
    """Keeps small copies of pictures spread evenly over all that go by, once it is open."""

    def __init__(self) -> None:
        self.wanted: set[int] = set()
        self.found: dict[int, str] = {}

    def open(self, count: int) -> None:
        """Wait for some of `count` pictures; those that an earlier run measured will not come."""
        self.wanted = set(np.linspace(0, count - 1, min(SHOWN, count)).astype(int).tolist())

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches as they are, having looked at them."""
        for ranks, pixels_BPP3, rows in batches:
            for rank, pixels in zip(ranks, pixels_BPP3, strict=True):
                if rank in self.wanted:
                    self.found[rank] = _thumbnail(pixels)
            yield ranks, pixels_BPP3, rows

    def pictures(self) -> list[str]:
        """Return the copies as PNG in base64, in the order of the pictures."""
        return [self.found[rank] for rank in sorted(self.found)]


def _thumbnail(pixels_PP3: Pixels) -> str:
    image, content = Image.fromarray(pixels_PP3), BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(content, "PNG", optimize=True)
    return b64encode(content.getvalue()).decode()
