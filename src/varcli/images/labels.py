"""Which class an image is of, as far as its place or its name tells."""

import re
from collections.abc import Iterable, Sequence

from varcli.classes import ClassEntry, ClassTable, imagenet
from varcli.images.dataset import class_level, class_name, natural_key
from varcli.images.provenance import file_words
from varcli.images.sources import path_parts

Label = ClassEntry | str | None
"""A class with its id, a class folder's name, or nothing known."""


def labels_by_name(members: Sequence[str]) -> list[Label]:
    """Return what the paths of a source's images say: as `var sample` names files, else by class folders."""
    parts = [path_parts(member) for member in members]
    sampled = _labels_by_file([names[-1] for names in parts])
    level = class_level(parts)
    folders = [class_name(names[level]) if len(names) > level + 1 else None for names in parts]
    if len({*folders}) == 1 and folders[0] not in _wnids():
        return list(sampled)  # a folder around them all is no class
    return [by_file or by_folder for by_file, by_folder in zip(sampled, folders, strict=True)]


def entry_of(class_id: int, name: str) -> ClassEntry:
    """Return a class of this id and name: ImageNet's own where it is that, perhaps written as in file names."""
    if class_id in imagenet():
        known = imagenet().by_id(class_id)
        if name in (known.name, file_words(known.name)):
            return known
    return ClassEntry(class_id, name, name)


def numbered(class_id: int) -> ClassEntry | None:
    """Return a class known by its number only; a negative one is none."""
    return ClassEntry(class_id, str(class_id), str(class_id)) if class_id >= 0 else None


def rows_of(labels: Sequence[Label]) -> tuple[ClassTable, list[int]]:
    """Return a table of the classes there are, and the row of each image's, -1 where it has none.

    Folders of WordNet ids are ImageNet's classes; others are numbered in natural order, after all ids.
    """
    wnids = _wnids()
    known = [wnids.get(label, label) if isinstance(label, str) else label for label in labels]
    by_id = _by_id(label for label in known if isinstance(label, ClassEntry))
    first = max(by_id, default=-1) + 1
    folders = sorted({label for label in known if isinstance(label, str)}, key=natural_key)
    by_name = {name: ClassEntry(first + i, name, name) for i, name in enumerate(folders)}
    table = ClassTable((*by_id.values(), *by_name.values()))
    entries = [by_name[label] if isinstance(label, str) else label for label in known]
    return table, [-1 if entry is None else table.label(entry.id) for entry in entries]


def _wnids() -> dict[str, ClassEntry]:
    return {entry.wnid: entry for entry in imagenet().entries}


def _by_id(entries: Iterable[ClassEntry]) -> dict[int, ClassEntry]:
    """Return the classes in order of their ids; one known by its number only takes the name another has for it."""
    found: dict[int, ClassEntry] = {}
    for entry in sorted(set(entries), key=lambda entry: (entry.id, entry.name == str(entry.id), entry.name)):
        found.setdefault(entry.id, entry)
    return found


def _labels_by_file(names: Sequence[str]) -> list[ClassEntry | None]:
    """Return the classes in names such as ``207-golden_retriever-0.png``.

    Only where each id has one name, and each name but ImageNet's one id: other files may look like it.
    """
    found = [re.fullmatch(r"([0-9]+)-(.*[^\W\d_].*)-[0-9]+\.png", name) for name in names]
    entries = {entry_of(int(match[1]), match[2]) for match in found if match}
    by_id = {entry.id: entry for entry in entries}
    others = [entry.name for entry in entries if entry.wnid == entry.name]
    if len(by_id) < len(entries) or len(set(others)) < len(others):
        return [None] * len(names)
    return [by_id[int(match[1])] if match else None for match in found]
