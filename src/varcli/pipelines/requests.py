"""Requests for images: class and seed of each, in order. No torch here."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil

from varcli.classes import RANDOM, ClassEntry, ClassTable, random_class
from varcli.errors import ConfigError
from varcli.images.provenance import Provenance


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One image to be sampled: its label and seed, and the provenance of its file."""

    label: int
    """Index in the class table; the number of classes stands for "no class"."""
    seed: int
    provenance: Provenance


def request(entry: ClassEntry | None, seed: int, table: ClassTable, common: Provenance) -> SampleRequest:
    """Request one image.

    Args:
        entry: its class; None is "no class", and `RANDOM` a class chosen by the seed.
        seed: of the image.
        table: the classes the model knows.
        common: provenance that all images of a run share.

    Raises:
        ConfigError: the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"--seed must be 0 or more (got {seed})")
    if entry is RANDOM:
        entry = random_class(table, seed)
    if entry is None:
        return SampleRequest(len(table), seed, replace(common, seed=seed))
    provenance = replace(common, class_id=entry.id, class_name=entry.name, seed=seed)
    return SampleRequest(table.label(entry.id), seed, provenance)


def class_requests(
    entries: Iterable[ClassEntry | None], count: int, seed: int, table: ClassTable, common: Provenance
) -> Iterator[list[SampleRequest]]:
    """Request `count` images per class, class after class; each class's seeds count up from `seed`.

    A class that is named again continues with the next seeds.

    Raises:
        ConfigError: the count is less than 1, or the seed negative.
    """
    if count < 1:
        raise ConfigError(f"--count must be 1 or more (got {count})")
    used: Counter[ClassEntry | None] = Counter()
    for entry in entries:
        first = seed + used[entry]
        used[entry] += count
        yield [request(entry, number, table, common) for number in range(first, first + count)]


def candidate_count(kept: int, best_of: float) -> int:
    """Number of images to sample for `kept` images with `best_of` candidates each."""
    return ceil(kept * best_of - 1e-9)  # 9 × (1 / 0.9) is a little more than 10
