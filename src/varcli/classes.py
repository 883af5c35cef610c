"""Classes a model knows, and what a user may type for one. No torch here.

A class has an id, which users type and file names have, and a label, its index in the transformer's class table. For
ImageNet's thousand both are the ImageNet index; a model of fewer classes keeps the ids and has fewer labels.
"""

import json
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from itertools import chain

from varcli.console import in_words
from varcli.errors import CheckpointError, InputError, UsageError
from varcli.files import parse_json


def plain(text: str) -> str:
    """Return a name as it is compared: lower case, with single spaces between words."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def exact_match(entries: "Sequence[ClassEntry]", words: str) -> "list[ClassEntry]":
    """Return the classes with exactly this name.

    One that is equal letter by letter goes first, for C++ and C# are both c as names are compared; then first names
    go before synonyms.
    """
    for alike in (str, str.casefold):
        same = [entry for entry in entries if alike(words) in (alike(entry.name), alike(entry.wnid))]
        if same:
            return same
    wanted = plain(words)
    first = [entry for entry in entries if wanted in (plain(entry.name), plain(entry.wnid))]
    rest = (entry for entry in entries if wanted in map(plain, (*entry.synonyms, " ".join(entry.names))))
    return first or list(rest)


def whole_words(entries: "Sequence[ClassEntry]", words: str) -> "list[ClassEntry]":
    """Return the classes that have all of these words, whole, in one of their names."""
    wanted = set(plain(words).split())
    return [e for e in entries if wanted and any(wanted <= set(plain(name).split()) for name in e.names)]


def partial_match(entries: "Sequence[ClassEntry]", words: str) -> "list[ClassEntry]":
    """Return the classes that have all of these words, or parts of words, in one of their names."""
    wanted = plain(words).split()
    return [e for e in entries if wanted and any(all(word in plain(name) for word in wanted) for name in e.names)]


def close_to(entries: "Sequence[ClassEntry]", words: str) -> "list[ClassEntry]":
    """Return up to five classes whose names are almost these words or, failing that, have a word almost like one."""
    from difflib import get_close_matches

    names = [(plain(name), entry) for entry in entries for name in entry.names]
    in_parts = [(word, entry) for name, entry in names for word in name.split()]
    long = [word for word in plain(words).split() if len(word) > 3]
    for known, wanted, likeness in ((names, [plain(words)], 0.75), (in_parts, long, 0.8)):
        spellings = {name for name, _ in known}
        close = [name for text in wanted for name in get_close_matches(text, spellings, 5, likeness)]
        if close:
            return list(dict.fromkeys(entry for spelling in close for name, entry in known if name == spelling))[:5]
    return []


def nearest(wanted: "ClassEntry", entries: "Sequence[ClassEntry]") -> "list[ClassEntry]":
    """Return the three classes most like an ImageNet class that is not among them.

    Shared words of the names count first (another retriever for a retriever), above all the last word
    of a name. Then the index, among things of one kind: ImageNet's animals stand in the order of WordNet's
    tree, so that neighbours are related.
    """

    def likeness(entry: "ClassEntry") -> tuple[int, bool, int]:
        heads = {plain(name).split()[-1] for name in entry.names} & {plain(name).split()[-1] for name in wanted.names}
        alike = len(_long_words(wanted) & _long_words(entry)) + 2 * bool(heads)
        return -alike, _kind(entry) != _kind(wanted), abs(entry.id - wanted.id)

    return sorted(entries, key=likeness)[:3]


def _kind(entry: "ClassEntry") -> int:
    """Which range of ImageNet's indices a class is in."""
    return bisect(_KIND_STARTS, entry.id)


_KIND_STARTS = (398, 924, 970, 981, 984)
"""First indices of things, food, places, people and plants, after the animals."""


def _long_words(entry: "ClassEntry") -> set[str]:
    return {word for name in entry.names for word in plain(name).split() if len(word) > 2}


@dataclass(frozen=True, slots=True)
class ClassEntry:
    """One class."""

    id: int
    """What a user types: the ImageNet index, or the place in sorted order for other classes."""
    wnid: str
    """WordNet id, or the name of the folder its images came from."""
    name: str
    """The first of its names."""
    synonyms: tuple[str, ...] = ()
    """Its other names."""

    @property
    def names(self) -> tuple[str, ...]:
        """All its names, the first one first."""
        return (self.name, *self.synonyms)

    def __str__(self) -> str:
        """Return id and name as messages show them."""
        return f"{self.id} {self.name}"


RANDOM = ClassEntry(-1, "random", "random")
"""Stands for a random class for each image, which `random_class` chooses."""


@dataclass(frozen=True, slots=True)
class ClassTable:
    """The classes of a model or data set; the index of an entry is its label."""

    entries: tuple[ClassEntry, ...]
    _labels: dict[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_labels", {entry.id: label for label, entry in enumerate(self.entries)})

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, class_id: int) -> bool:
        return class_id in self._labels

    def label(self, class_id: int) -> int:
        """Return the label of the class with this id.

        Raises:
            InputError: no class has this id.
        """
        if class_id not in self._labels:
            raise InputError(f"there is no class {class_id}: {_extent(self)}")
        return self._labels[class_id]

    def by_id(self, class_id: int) -> ClassEntry:
        """Return the class with this id.

        Raises:
            InputError: no class has this id.
        """
        return self.entries[self.label(class_id)]

    def search(self, words: str) -> list[ClassEntry]:
        """Return the classes with all of these words in their names, the best matches first; of an index its class."""
        if by_index := [entry for entry in self.entries if str(entry.id) == words]:
            return by_index
        return list(
            dict.fromkeys(
                chain.from_iterable(
                    matches(self.entries, words) for matches in (exact_match, whole_words, partial_match)
                )
            )
        )

    def to_json(self) -> str:
        """Return the table as JSON: a list of [id, wnid, [names]] in the order of the labels."""
        return json.dumps([[entry.id, entry.wnid, list(entry.names)] for entry in self.entries], ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "ClassTable":
        """Return the table that `to_json` wrote.

        Raises:
            CheckpointError: the text is no such table.
        """
        try:
            rows = parse_json(text)
            for i, wnid, names in rows:
                if not (type(i) is int and isinstance(names, list) and all(isinstance(w, str) for w in (wnid, *names))):
                    raise ValueError
            return ClassTable(tuple(ClassEntry(i, wnid, *_first_and_rest(names)) for i, wnid, names in rows))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the class table must be a list of [id, wnid, [names]] (got {text[:40]})") from error


def _first_and_rest(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    first, *rest = names
    return first, tuple(rest)


@lru_cache(maxsize=1)
def imagenet() -> ClassTable:
    """Return the thousand classes of ImageNet, whose label is their index."""
    lines = (files("varcli") / "imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()[1:]
    fields = (line.split("\t") for line in lines)
    return ClassTable(tuple(ClassEntry(int(i), wnid, *_first_and_rest(names.split(", "))) for i, wnid, names in fields))


def random_class(table: ClassTable, seed: int) -> ClassEntry:
    """Return the class that an image of this seed gets with `--class random`."""
    number = int.from_bytes(sha256(f"class of {seed}".encode()).digest()[:8], "big")
    return table.entries[number % len(table)]


# --- what a user types -----------------------------------------------------------------------------


def parse_classes(
    specs: Sequence[str],
    table: ClassTable,
    lines: Iterable[str] = (),
    hint: str = "",
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[ClassEntry | None]:
    """Return the classes meant, in order; None is "no class" and `RANDOM` a random one for each image.

    A spec is an index, a name (whole, or a part that only one class has), a range such as 10-20 with
    both ends (unless that is a class's name), a list of these with commas, ``all``, ``none``, ``random``, or ``-``
    for one spec per line of `lines`. All but the lines are checked before this returns; a line is read when the
    iterator reaches it.

    Args:
        specs: what was typed, e.g. ["207", "tabby,none"].
        table: the classes the model knows.
        lines: where ``-`` reads; blank lines are passed over.
        hint: ends the message about an ImageNet class that the table lacks: which checkpoint has it.
        note: takes a remark about each class that was found by a part of its name.

    Raises:
        UsageError: a range runs backwards, or a spec is empty.
        InputError: a class is unknown, or a name belongs to several.
    """

    def parse(spec: str) -> list[ClassEntry | None]:
        return _parse(spec, table, hint, note)

    parts = [_from_lines(lines, parse) if spec.strip() == "-" else parse(spec) for spec in specs]
    return chain.from_iterable(parts)


def _from_lines(lines: Iterable[str], parse: Callable[[str], list[ClassEntry | None]]) -> Iterator[ClassEntry | None]:
    for line in lines:
        if line.strip():
            yield from parse(line)


def _parse(spec: str, table: ClassTable, hint: str, note: Callable[[str], None]) -> list[ClassEntry | None]:
    """Return the classes of one spec other than ``-``."""
    word = spec.strip()
    if not word:
        raise UsageError("--class must be an index, a name, a range, a list, all, none or random (got nothing)")
    if word.lower() in KEYWORDS:
        return KEYWORDS[word.lower()](table)
    if len(same := [entry for entry in table.entries if word == entry.name]) == 1 and not word.isdecimal():
        return [*same]  # such as a class called 10-20
    if span := re.fullmatch(r"([0-9]{1,18})\s*-\s*([0-9]{1,18})", word):
        return [_by_index(i, table, hint) for i in _span(int(span[1]), int(span[2]))]
    if re.fullmatch(r"-?[0-9]{1,18}", word):
        return [_by_index(int(word), table, hint)]
    if "," in word and len(exact_match(table.entries, word)) != 1:
        # A name with a comma in it, or all names of a class as ImageNet writes them, is no list.
        return [entry for item in word.split(",") for entry in _parse(item, table, hint, note)]
    return [_by_name(word, table, hint, note)]


KEYWORDS: dict[str, Callable[[ClassTable], list[ClassEntry | None]]] = {
    "all": lambda table: list(table.entries),
    "none": lambda _: [None],
    "random": lambda _: [RANDOM],
}


def _span(first: int, last: int) -> range:
    if first > last:
        raise UsageError(f"a range of classes begins with the smaller index: {last}-{first} (got {first}-{last})")
    return range(first, last + 1)


def _by_index(class_id: int, table: ClassTable, hint: str) -> ClassEntry:
    if class_id not in table and class_id in imagenet() and _is_part_of_imagenet(table):
        raise _lacking([imagenet().by_id(class_id)], table, hint)
    return table.by_id(class_id)


def _by_name(word: str, table: ClassTable, hint: str, note: Callable[[str], None]) -> ClassEntry:
    """Return the one class meant by a name, the most literal reading first."""
    elsewhere = imagenet().entries if _is_part_of_imagenet(table) else ()
    for matches in (exact_match, whole_words, partial_match):
        found = matches(table.entries, word)
        if len(found) == 1:
            if matches is not exact_match:
                names = ", ".join(found[0].names)
                note(f"--class {word} is taken to be {found[0].id} ({names}): no other class of this model fits")
            return found[0]
        if found:
            raise InputError(f"several classes are called {word}: {_listing(found)}")
        if wanted := matches(elsewhere, word):
            raise _lacking(wanted, table, hint)
    raise InputError(f"there is no class called {word}; {_closest(word, table)}")


def _is_part_of_imagenet(table: ClassTable) -> bool:
    return all(e.id in imagenet() and imagenet().by_id(e.id).wnid == e.wnid for e in table.entries)


# --- messages --------------------------------------------------------------------------------------


def _lacking(wanted: Sequence[ClassEntry], table: ClassTable, hint: str) -> InputError:
    """Return the error for ImageNet classes that the table lacks: the nearest it has, and which checkpoint has all."""
    known = f"the nearest of the {len(table)} it knows are {_listing(nearest(wanted[0], table.entries))}"
    return InputError(f"this checkpoint does not know {_listing(wanted)}; {known}" + (f"; {hint}" if hint else ""))


def _closest(word: str, table: ClassTable) -> str:
    """Return advice on what an unknown name might have meant."""
    close = close_to(table.entries, word)
    return f"close to it: {_listing(close)}" if close else _extent(table)


def _extent(table: ClassTable) -> str:
    """Describe which ids a table has, and how to list them; a few classes are named."""
    if len(table) <= 5:
        return f"this checkpoint knows {_listing(table.entries)}"
    ids = sorted(table._labels)
    known = f"{len(ids)} classes between {ids[0]} and {ids[-1]}"
    if ids == list(range(len(ids))):
        known = f"0 to {len(ids) - 1}"
    return f"this checkpoint knows {known}; `var classes` with the same --checkpoint lists them"


def _listing(entries: Sequence[ClassEntry]) -> str:
    return in_words([str(entry) for entry in entries], 8)
