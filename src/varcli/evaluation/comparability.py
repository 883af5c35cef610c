"""Warnings about figures that cannot be compared with the paper's. Nothing here stops a run.

Each rule is a mistake that users of the released code made.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from varcli.console import counted

FEW = 10_000
"""With fewer images than this, the bias of FID is larger than the differences between models."""
PUBLISHED_IMAGES = 50_000
"""Images of every published figure."""


def few_images(count: int, bias: float | None) -> Iterable[str]:
    """Warn where so few images bias figures; `bias` is by how much FID, if that was estimated."""
    if count < FEW:
        rough = "at most about" if count < 4096 else "about"  # FID∞ of few images is too low
        what = "figures of so few are biased" if bias is None else f"FID is biased upwards, by {rough} {bias:.3g}"
        yield f"only {counted(count, 'image')}: {what}; published figures are of {PUBLISHED_IMAGES}"


def imbalance(labels: Sequence[int], names: Sequence[str]) -> Iterable[str]:
    """Warn where classes have unequal numbers of images; `labels` are the images' classes, -1 where unknown."""
    counts = Counter(label for label in labels if label >= 0)
    missing = len(names) - len(counts)
    if not counts:
        return
    if missing:
        yield f"{missing} of {len(names)} classes have no image; published figures have 50 of each"
    most, fewest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[most] != counts[fewest]:
        yield (
            f"classes are not balanced: {counts[most]} images of {names[most]}, {counts[fewest]} of {names[fewest]}; "
            "published figures have the same number of each"
        )


def lossy(count: int, total: int) -> Iterable[str]:
    """Warn of images that were compressed as JPEG."""
    if count:
        yield f"{count} of {total} images are JPEG, whose traces change FID; PNG or raw pixels"


def other_size(pixels: int, reference: int | None) -> Iterable[str]:
    """Warn where images and reference differ in size."""
    if reference and pixels != reference:
        yield f"images of {pixels} pixels per side against a reference of {reference}; FID compares resolutions too"


def small_reference(count: int | None) -> Iterable[str]:
    """Warn of a reference of few images, which biases FID as few measured ones do; None is unknown."""
    if count is not None and count < FEW:
        yield f"a reference of only {count} images: it biases FID too, and FID∞ does not correct for it"


def other_settings(given: Mapping[str, Any], preset: Mapping[str, Any]) -> Iterable[str]:
    """Warn of sampling settings that are not the preset for measuring."""
    changed = [f"{name} {given[name]} instead of {value}" for name, value in preset.items() if given[name] != value]
    if changed:
        yield f"{', '.join(changed).replace('_', '-')}: not the settings for measuring"


def several_series(counts: Mapping[str, int]) -> Iterable[str]:
    """Warn of images sampled by several models or settings; `counts` has the images of each."""
    if len(counts) > 1:
        listed = "; ".join(f"{count} by {series}" for series, count in sorted(counts.items())[:4])
        more = f"; and {len(counts) - 4} more" if len(counts) > 4 else ""
        yield f"images of {len(counts)} models or settings are measured together: {listed}{more}"


def other_precision(dtype: str) -> Iterable[str]:
    """Warn of a precision that changes samples enough to matter."""
    if dtype == "int8":
        yield "weights and activations in int8: an approximation, not the model as published"


def rejection(classifier: str) -> Iterable[str]:
    """Warn that a classifier chose the images."""
    yield f"images chosen by {classifier}: to be compared with figures of rejection sampling only"


def other_reference(name: str, usual: str) -> Iterable[str]:
    """Warn of another reference than the published figures'."""
    if name != usual:
        yield f"measured against {name}; published figures are against {usual}"


def skipped(names: Sequence[str]) -> Iterable[str]:
    """Warn of images that could not be read."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"left out as unreadable: {counted(len(names), 'image')}: {', '.join(names[:3])}{more}"
