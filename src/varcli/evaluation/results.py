"""Some of the images that are measured, to be looked at in a report."""

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from varcli.evaluation.extractors import Pixels
from varcli.evaluation.feature_pass import Batch

KIND, FORMAT = "varcli-eval", 1
"""What tells a result's JSON from other files, and its version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """A named file that takes part: its name, and the sha256 that tells it from others of that name."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceOrigin(Origin):
    """What the images are measured against."""

    n: int | None
    """Images it is made of, None where it does not say."""
    pixels: int | None
    """Their side, None where it does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What the paper says of a checkpoint."""

    fid: float
    inception_score: float | None
    band: tuple[float, float] | None
    """FID of others who measured the released weights, lowest and highest."""
    inside: bool | None
    """Whether the FID found lies in the band; None where either is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassSpread:
    """How much a class's images differ from each other."""

    id: int
    name: str
    n: int
    spread: float
    """Root of the mean squared distance of their features to the class's mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One evaluation."""

    version: str
    """Of varcli."""
    date: str
    """UTC, ISO 8601."""
    what: str
    """"samples", "images" or "tokenizer"."""
    checkpoint: Mapping[str, Any] | None
    """Name, sha256 and settings, where images were made for this."""
    source: Mapping[str, Any] | None
    """Paths, where images were there."""
    n: int
    """Images measured."""
    classes: int | None
    """Of how many classes, None where nothing says."""
    reference: ReferenceOrigin | None
    extractor: Origin
    protocol: Mapping[str, Any]
    metrics: Mapping[str, Any]
    published: Published | None
    per_class: Sequence[ClassSpread] | None
    warnings: Sequence[str]
    seconds: Mapping[str, float]
    images: Sequence[str] = field(default=())
    """Some of the images, PNG in base64, for a report."""

    def facts(self) -> dict[str, Any]:
        """Return the result as JSON knows values."""
        return {"kind": KIND, "format": FORMAT} | asdict(self)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield what to show of it, name and value: the figures, then all that decides them."""
        yield from _figures(self.metrics)
        of = f", {self.classes} classes" if self.classes else ""
        yield "pictures", f"{self.n}{of}"
        if self.checkpoint:
            yield "checkpoint", f"{self.checkpoint['name']}, sha256 {self.checkpoint['sha256'][:12]}"
            settings = [f"{name} {value}" for name in _SHOWN if (value := self.checkpoint.get(name)) not in (None, "")]
            yield "settings", ", ".join(settings).replace("_", "-")
        if self.reference:
            yield "reference", _named(self.reference) + (f", {self.reference.n} images" if self.reference.n else "")
        yield "extractor", _named(self.extractor)
        yield "protocol", ", ".join(f"{name} {value}" for name, value in self.protocol.items() if value is not None)
        if self.published:
            yield "published", _published(self.published)


_SHOWN = ("cfg", "top_k", "top_p", "smooth", "approximate", "seed", "device", "dtype")
"""Settings of a checkpoint worth a place in the block."""


def _named(origin: Origin) -> str:
    return f"{origin.name}, sha256 {origin.sha256[:12]}"


def _figures(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each figure with what belongs to it."""
    for name, title, digits in _TITLES:
        if name not in metrics:
            continue
        value = metrics[name]
        if isinstance(value, list):
            yield title, " ".join(f"{100 * share:.0f}" for share in value) + " %"
            continue
        text = f"{value:.{digits}f}"
        if f"{name}_std" in metrics:
            text += f" ± {metrics[f'{name}_std']:.{digits}f}"
        if f"{name}_infinity" in metrics:
            text += f" (FID∞ {metrics[f'{name}_infinity']:.{digits}f}, an estimate for any number of images)"
        yield title, text


_TITLES = (
    ("fid", "FID", 2),
    ("inception_score", "inception score", 2),
    ("kid", "KID", 5),
    ("precision", "precision", 4),
    ("recall", "recall", 4),
    ("rfid", "rFID", 2),
    ("psnr", "PSNR, dB", 2),
    ("ssim", "SSIM", 4),
    ("lpips", "LPIPS", 4),
    ("codebook_usage", "codebook in use, scale by scale", 0),
)
"""Figures in the order they are shown, with digits behind the point."""


def _published(published: Published) -> str:
    score = "" if published.inception_score is None else f", IS {published.inception_score:.1f}"
    text = f"FID {published.fid:.2f}{score}"
    if published.band:
        low, high = published.band
        text += f"; others measured {low:g} to {high:g}"
    if published.inside is not None:
        text += ": this is inside" if published.inside else ": this is outside"
    return text


SHOWN, THUMBNAIL = 24, 128
"""How many, and the most pixels a side of them."""


class Gallery:
    """Keeps small copies of images spread evenly over all that go by, once it is open."""

    def __init__(self) -> None:
        self.wanted: set[int] = set()
        self.found: dict[int, str] = {}

    def open(self, count: int) -> None:
        """Wait for some of `count` images; those that an earlier run measured will not come."""
        self.wanted = set(np.linspace(0, count - 1, min(SHOWN, count)).astype(int).tolist())

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches as they are, having looked at them."""
        for ranks, pixels_BPP3, rows in batches:
            for rank, pixels in zip(ranks, pixels_BPP3, strict=True):
                if rank in self.wanted:
                    self.found[rank] = _thumbnail(pixels)
            yield ranks, pixels_BPP3, rows

    def images(self) -> list[str]:
        """Return the copies as PNG in base64, in the order of the images."""
        return [self.found[rank] for rank in sorted(self.found)]


def _thumbnail(pixels_PP3: Pixels) -> str:
    image, content = Image.fromarray(pixels_PP3), BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(content, "PNG", optimize=True)
    return b64encode(content.getvalue()).decode()
