"""Which pictures are wanted: of which class, from which seed, one after the other. No torch here."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING

from varcli.commands.settings import hint
from varcli.data.classes import RANDOM, ClassEntry, ClassTable, parse_classes, random_class

if TYPE_CHECKING:
    from varcli.data.images import Provenance


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to be made: what the sampler is asked for, and what the file will say of it."""

    row: int
    seed: int
    made: "Provenance"


@dataclass(frozen=True, slots=True)
class Series:
    """Hands out each class's pictures, `count` at a time; their seeds count up from `seed`."""

    table: ClassTable
    count: int
    seed: int
    origin: "Provenance"
    """What all of them have in common."""
    say: Callable[[str], None]
    """Takes notes for the user."""
    used: Counter[ClassEntry | None] = field(default_factory=Counter)

    def classes(self, specs: Sequence[str]) -> tuple[Iterable[Iterable[Picture]], int | None]:
        """Return the pictures of each class that was typed, and how many classes they are.

        Those from stdin are read one by one as they are asked for, and their number is unknown (None).
        """
        entries = parse_classes(specs, self.table, sys.stdin, hint(), self._take)
        if from_stdin(specs):
            return map(self.pictures, entries), None
        known = list(entries)
        return map(self.pictures, known), len(known)

    def pictures(self, wanted: ClassEntry | None) -> Iterator[Picture]:
        """Yield the next pictures of a class, "no class" or one by chance."""
        first = self.seed + self.used[wanted]
        self.used[wanted] += self.count
        for number in range(first, first + self.count):
            entry = random_class(self.table, number) if wanted is RANDOM else wanted
            if entry is None:
                yield Picture(len(self.table), number, replace(self.origin, seed=number))
            else:
                made = replace(self.origin, class_id=entry.id, class_name=entry.name, seed=number)
                yield Picture(self.table.row(entry.id), number, made)

    def _take(self, word: str, entry: ClassEntry) -> None:
        self.say(f"class: {word}; taken for {entry}, the only one this checkpoint knows with such a name")


def candidates(kept: int, fraction: float) -> int:
    """Return of how many pictures `kept` are the best `fraction`, in (0, 1]."""
    return ceil(kept / fraction - 1e-9)  # 9 / 0.9 is a little more than 10


def from_stdin(specs: Sequence[str]) -> bool:
    """Return whether classes come from stdin, a line each."""
    return "-" in map(str.strip, specs)
