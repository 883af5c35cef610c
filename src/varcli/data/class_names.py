"""Finding classes by their names, and the ones most like a given class. No torch here."""

import re
from bisect import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from varcli.data.classes import ClassEntry

    Entries = Sequence[ClassEntry]


def plain(text: str) -> str:
    """Return a name as it is compared: small letters, single spaces for whatever separates words."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def exact(entries: "Entries", words: str) -> "list[ClassEntry]":
    """Return the classes with exactly this name; their first names, if any is it, go before synonyms."""
    wanted = plain(words)
    first = [entry for entry in entries if wanted in (plain(entry.name), plain(entry.wnid))]
    rest = (entry for entry in entries if wanted in map(plain, (*entry.synonyms, " ".join(entry.names))))
    return first or list(rest)


def whole(entries: "Entries", words: str) -> "list[ClassEntry]":
    """Return the classes that have all of these words, whole, in one of their names."""
    wanted = set(plain(words).split())
    return [e for e in entries if wanted and any(wanted <= set(plain(name).split()) for name in e.names)]


def part(entries: "Entries", words: str) -> "list[ClassEntry]":
    """Return the classes that have all of these words, or parts of words, in one of their names."""
    wanted = plain(words).split()
    return [e for e in entries if wanted and any(all(part in plain(name) for part in wanted) for name in e.names)]


def close_to(entries: "Entries", words: str, count: int = 5) -> "list[ClassEntry]":
    """Return the classes whose names are almost these words or, if none are, have a word that is almost one of them."""
    from difflib import get_close_matches  # noqa: PLC0415 - only on the way to an error

    names = [(plain(name), entry) for entry in entries for name in entry.names]
    in_parts = [(word, entry) for name, entry in names for word in name.split()]
    long = [word for word in plain(words).split() if len(word) > 3]
    for known, wanted, likeness in ((names, [plain(words)], 0.75), (in_parts, long, 0.8)):
        spellings = {name for name, _ in known}
        close = [name for text in wanted for name in get_close_matches(text, spellings, count, likeness)]
        if close:
            return list(dict.fromkeys(entry for spelling in close for name, entry in known if name == spelling))[:count]
    return []


def nearest(wanted: "ClassEntry", entries: "Entries", count: int = 3) -> "list[ClassEntry]":
    """Return the classes most like an ImageNet class that is not among them.

    Shared words of the names count first (another retriever for a retriever), above all the last word
    of a name. Then the index, among things of one kind: ImageNet's animals stand in the order of WordNet's
    tree, so that neighbours are kin.
    """

    def likeness(entry: "ClassEntry") -> tuple[int, bool, int]:
        heads = {plain(name).split()[-1] for name in entry.names} & {plain(name).split()[-1] for name in wanted.names}
        alike = len(_words(wanted) & _words(entry)) + 2 * bool(heads)
        return -alike, _kind(entry) != _kind(wanted), abs(entry.id - wanted.id)

    return sorted(entries, key=likeness)[:count]


def _kind(entry: "ClassEntry") -> int:
    """Return which stretch of ImageNet's indices a class lies in."""
    return bisect(_KIND_STARTS, entry.id)


_KIND_STARTS = (398, 924, 970, 981, 984)
"""Where animals give way to things, these to food, places, people, plants."""


def _words(entry: "ClassEntry") -> set[str]:
    return {word for name in entry.names for word in plain(name).split() if len(word) > 2}
