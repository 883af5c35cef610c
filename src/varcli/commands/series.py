"""Which images are wanted: of which class, from which seed, one after the other. No torch here."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING

from varcli.classes import RANDOM, ClassEntry, ClassTable, parse_classes, random_class
from varcli.commands.settings import hint

if TYPE_CHECKING:
    from varcli.images.provenance import Provenance


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One image to be made: what the sampler is asked for, and what the file will say of it."""

    row: int
    seed: int
    made: "Provenance"


@dataclass(frozen=True, slots=True)
class Series:
    """Hands out each class's images, `count` at a time; their seeds count up from `seed`."""

    table: ClassTable
    count: int
    seed: int
    origin: "Provenance"
    """What all of them have in common."""
    say: Callable[[str], None]
    """Takes notes for the user."""
    used: Counter[ClassEntry | None] = field(default_factory=Counter)

    def classes(self, specs: Sequence[str]) -> tuple[Iterable[Iterable[SampleRequest]], int | None]:
        """Return the images of each class that was typed, and how many classes they are.

        Those from stdin are read one by one as they are asked for, and their number is unknown (None).
        """
        entries = parse_classes(specs, self.table, sys.stdin, hint(), self._take)
        if from_stdin(specs):
            return map(self.images, entries), None
        known = list(entries)
        return map(self.images, known), len(known)

    def images(self, wanted: ClassEntry | None) -> Iterator[SampleRequest]:
        """Yield the next images of a class, "no class" or one by chance."""
        first = self.seed + self.used[wanted]
        self.used[wanted] += self.count
        for number in range(first, first + self.count):
            entry = random_class(self.table, number) if wanted is RANDOM else wanted
            if entry is None:
                yield SampleRequest(len(self.table), number, replace(self.origin, seed=number))
            else:
                made = replace(self.origin, class_id=entry.id, class_name=entry.name, seed=number)
                yield SampleRequest(self.table.row(entry.id), number, made)

    def _take(self, word: str, entry: ClassEntry) -> None:
        self.say(f"class: {word}; taken for {entry}, the only one this checkpoint knows with such a name")


def candidates(kept: int, fraction: float) -> int:
    """Return of how many images `kept` are the best `fraction`, in (0, 1]."""
    return ceil(kept / fraction - 1e-9)  # 9 / 0.9 is a little more than 10


def from_stdin(specs: Sequence[str]) -> bool:
    """Return whether classes come from stdin, a line each."""
    return "-" in map(str.strip, specs)
