"""The result of an evaluation: JSON in both directions, lines to print, thumbnails for a report. No torch here."""

import dataclasses
import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from io import BytesIO
from types import UnionType
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
from PIL import Image

from varcli.config import SampleConfig
from varcli.console import counted
from varcli.errors import InputError
from varcli.evaluation.metrics import METRICS, Figure

if TYPE_CHECKING:
    from varcli.evaluation.extractors import Pixels
    from varcli.evaluation.feature_pass import Batch

KIND, FORMAT = "varcli-eval", 1
"""What marks a result's JSON, and its version."""
LARGEST = 1e15
"""All numbers of a result must be smaller."""
SETTINGS = (*(option.name for option in fields(SampleConfig)), "seed", "device", "dtype")
"""Sampling settings that a result shows."""
OFF = {option.name: option.default for option in fields(SampleConfig) if not option.metadata["always"]}
"""Values of settings that are off, and not shown in lines."""

Setting = str | bool | float | None
Settings = Mapping[str, Setting | Sequence[Setting]]


FIGURES: dict[str, Figure] = {
    **{name: figure for metric in METRICS.values() for name, figure in metric.figures.items()},
    **{
        f"r{name}": replace(figure, title=f"r{figure.title}")  # of reconstructions
        for metric in METRICS.values()
        if metric.reconstruction_prefix == "r"
        for name, figure in metric.figures.items()
    },
    "psnr": Figure("PSNR, dB", 2),
    "ssim": Figure("SSIM", 4),
    "lpips": Figure("LPIPS", 4, lower_is_better=True),
    "codebook_usage": Figure("codebook usage per scale", 0),
}
"""Figures by their name in a result, in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Name and sha256 of a file that was used."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceOrigin(Origin):
    """What the images are measured against."""

    n: int | None
    """Number of its images, None where it does not say."""
    pixels: int | None
    """Side of its images, None where it does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """The paper's figures of a checkpoint."""

    fid: float
    inception_score: float | None
    band: tuple[float, float] | None
    """Lowest and highest FID that others measured of the released weights."""
    inside: bool | None
    """Whether the measured FID lies in the band; None where either is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassSpread:
    """How much the images of a class differ from each other."""

    id: int
    name: str
    n: int
    """Number of images."""
    spread: float
    """Root of the mean squared distance of their features to the mean of the class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One evaluation."""

    version: str
    """Of varcli."""
    date: str
    """UTC, ISO 8601."""
    what: str
    """"samples", "images" or "tokenizer"."""
    checkpoint: Settings | None
    """Name, sha256 and sampling settings, where images were generated for this."""
    source: Settings | None
    """Paths, where images existed."""
    n: int
    """Number of measured images."""
    classes: int | None
    """Number of their classes, None where it is unknown."""
    reference: ReferenceOrigin | None
    extractor: Origin
    protocol: Settings
    """Everything else that determines the figures."""
    metrics: Mapping[str, float | Sequence[float]]
    """Figures by name; those of `FIGURES` are shown."""
    published: Published | None
    per_class: Sequence[ClassSpread] | None
    warnings: Sequence[str] = ()
    """What makes the figures incomparable with published ones."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[str] = ()
    """Thumbnails of some of the images, PNG in base64."""

    def facts(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"kind": KIND, "format": FORMAT} | asdict(self)

    @classmethod
    def from_json(cls, facts: Any, origin: str) -> "Result":
        """Read the JSON values of a result, also those of earlier versions.

        Args:
            facts: what `facts` returned; a field that may be None may be missing.
            origin: where they come from, for errors.

        Raises:
            InputError: they are something else, or a field is wrong; the message names it.
        """
        where = f"the evaluation result {origin}"
        if not isinstance(facts, dict) or facts.get("kind") != KIND:
            raise InputError(f"{where} must be what `var eval --out` or `--json` writes")
        if facts.get("format") != FORMAT:
            raise InputError(f"{where} must have format {FORMAT} (got {json.dumps(facts.get('format'))[:40]})")
        values = {name: value for name, value in _renamed(facts).items() if name not in ("kind", "format")}
        result: Result = _read(cls, values, f"{where}: ")
        for part, names in (("checkpoint", ("name", "sha256")), ("source", ("paths",))):
            if (settings := getattr(result, part)) is not None:
                for name in names:
                    _read(Sequence[str] if name == "paths" else str, settings.get(name), f"{where}: {part}.{name}")
        for number, image in enumerate(result.images):
            _check_png(image, f"{where}: images[{number}]")
        return result

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield lines to print, name and value: the figures, then all that determines them."""
        yield from _figures(self.metrics)
        yield "images", f"{self.n}, {counted(self.classes, 'class')}" if self.classes else str(self.n)
        if self.checkpoint:
            yield "checkpoint", _named(self.checkpoint["name"], self.checkpoint["sha256"])
            shown = {
                name: value for name in SETTINGS if (value := self.checkpoint.get(name)) not in (None, OFF.get(name))
            }
            yield "settings", ", ".join(f"{name.replace('_', '-')} {value}" for name, value in shown.items())
        if self.reference:
            count = f", {counted(self.reference.n, 'image')}" if self.reference.n else ""
            yield "reference", _named(self.reference.name, self.reference.sha256) + count
        if self.extractor.sha256:
            yield "extractor", _named(self.extractor.name, self.extractor.sha256)
        yield "protocol", ", ".join(f"{name} {value}" for name, value in self.protocol.items() if value is not None)
        if self.published:
            yield "published", _published(self.published)


def _named(name: Any, sha256: Any) -> str:
    return f"{name}, sha256 {sha256[:12]}"


def _figures(metrics: Mapping[str, float | Sequence[float]]) -> Iterator[tuple[str, str]]:
    """Yield each figure with its standard deviation and its estimate for infinitely many images."""
    for name, figure in FIGURES.items():
        value = metrics.get(name)
        if isinstance(value, Sequence):
            yield figure.title, " ".join(f"{100 * share:.0f}" for share in value) + " %"
        elif value is not None:
            text = f"{value:.{figure.digits}f}"
            if f"{name}_std" in metrics:
                text += f" ± {metrics[f'{name}_std']:.{figure.digits}f}"
            if f"{name}_infinity" in metrics:
                limit = f"{metrics[f'{name}_infinity']:.{figure.digits}f}"
                text += f" ({figure.title.removeprefix('r')}∞ {limit}, extrapolated to infinitely many images)"
            yield figure.title, text


def _published(published: Published) -> str:
    score = "" if published.inception_score is None else f", IS {published.inception_score:.1f}"
    text = f"FID {published.fid:.2f}{score}"
    if published.band:
        low, high = published.band
        text += f"; others measured {low:g} to {high:g}"
    if published.inside is not None:
        text += ": this is inside" if published.inside else ": this is outside"
    return text


# --- reading ----------------------------------------------------------------------------------------


def _renamed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Replace names of earlier versions by the present ones."""

    def rename(part: Any, old: str, new: str) -> Any:
        if not isinstance(part, dict) or old not in part or new in part:
            return part
        return {new if name == old else name: value for name, value in part.items()}

    facts = rename(facts, "pictures", "images")
    parts = {"checkpoint": ("draft", "approximate"), "seconds": ("pictures", "images")}
    renamed = {part: rename(facts[part], *names) for part, names in parts.items() if part in facts}
    return {**facts, **renamed} | ({"what": "images"} if facts.get("what") == "pictures" else {})


def _wrong(value: Any, where: str, expected: str) -> NoReturn:
    raise InputError(f"{where} must be {expected} (got {json.dumps(value)[:40]})")


def _read(kind: Any, value: Any, where: str) -> Any:
    """Read a JSON value by a field's annotation; numbers must be finite.

    Raises:
        InputError: it is something else.
    """
    if isinstance(kind, UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        kinds = [each for each in get_args(kind) if each is not type(None)]
        for each in kinds:
            if isinstance(value, _json_type(each)):
                return _read(each, value, where)
        _wrong(value, where, " or ".join(_expected(each) for each in kinds))
    if not isinstance(value, _json_type(kind)) or (isinstance(value, bool) and kind is not bool):
        _wrong(value, where, _expected(kind))
    if kind in (int, float) and (not abs(value) < LARGEST or (kind is int and value < 0)):
        _wrong(value, where, _expected(kind))
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where)
    if get_origin(kind) is Mapping:
        return {name: _read(get_args(kind)[1], each, f"{where}.{name}") for name, each in value.items()}
    if get_origin(kind) is tuple and len(value) != len(get_args(kind)):
        _wrong(value, where, f"a list of {len(get_args(kind))}")
    if get_origin(kind) in (tuple, Sequence):
        items = [_read(get_args(kind)[0], each, f"{where}[{number}]") for number, each in enumerate(value)]
        return tuple(items) if get_origin(kind) is tuple else items
    return value


def _read_fields(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    """Read a JSON object as a dataclass; a field that is missing or null is its default, or None where it may be."""
    dot, types, found = "" if where.endswith(" ") else ".", get_type_hints(kind), {}
    for each in fields(kind):
        value, place = values.get(each.name), f"{where}{dot}{each.name}"
        if value is not None:
            found[each.name] = _read(types[each.name], value, place)
        elif type(None) in get_args(types[each.name]):
            found[each.name] = None
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise InputError(f"{place} is missing")
    if unknown := values.keys() - types.keys():
        raise InputError(f"{where}{dot}{min(unknown)} is not a field that this version of varcli knows")
    return kind(**found)


def _json_type(kind: Any) -> Any:
    """The Python type that JSON has for an annotation."""
    if kind is float:
        return (int, float)
    if dataclasses.is_dataclass(kind) or get_origin(kind) is Mapping:
        return dict
    return list if get_origin(kind) in (tuple, Sequence) else kind


def _expected(kind: Any) -> str:
    """An annotation in words."""
    words = {str: "a string", bool: "true or false", int: "a whole number of at least 0", float: "a number"}
    return words.get(kind) or {list: "a list", dict: "an object"}[_json_type(kind)]


def _check_png(text: str, where: str) -> None:
    try:
        if b64decode(text, validate=True).startswith(b"\x89PNG\r\n\x1a\n"):
            return
    except ValueError:
        pass
    _wrong(text, where, "a PNG in base64")


# --- thumbnails -------------------------------------------------------------------------------------

THUMBNAILS, THUMBNAIL_PIXELS = 24, 128
"""How many a result has, and the longer side of each."""


class Gallery:
    """Keeps thumbnails of images spread evenly over all that are measured, once it is open."""

    def __init__(self) -> None:
        self.wanted: set[int] = set()
        self.found: dict[int, str] = {}

    def open(self, count: int) -> None:
        """Choose some of `count` images; those that an earlier run measured will be missing."""
        self.wanted = set(np.linspace(0, count - 1, min(THUMBNAILS, count)).astype(int).tolist())

    def watched(self, batches: "Iterable[Batch]") -> "Iterator[Batch]":
        """Yield batches unchanged, keeping thumbnails of some images."""
        for positions, pixels_BHW3, labels in batches:
            for position, pixels_HW3 in zip(positions, pixels_BHW3, strict=True):
                if position in self.wanted:
                    self.found[position] = thumbnail(pixels_HW3)
            yield positions, pixels_BHW3, labels

    def images(self) -> list[str]:
        """The thumbnails, in the order of the images."""
        return [self.found[position] for position in sorted(self.found)]


def thumbnail(pixels_HW3: "Pixels") -> str:
    """Shrink an image to a PNG in base64."""
    image, content = Image.fromarray(pixels_HW3), BytesIO()
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    image.save(content, "PNG", optimize=True)
    return b64encode(content.getvalue()).decode()
