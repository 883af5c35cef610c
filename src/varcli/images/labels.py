"""Labels of images: from class folders, file names or files beside the images."""

import operator
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

from varcli.classes import ClassEntry, ClassTable, imagenet
from varcli.errors import InputError
from varcli.files import parse_json
from varcli.images.provenance import Provenance, file_words, provenance_from_json
from varcli.images.sources import ARCHIVE_ERRORS, Source, path_parts

Label = ClassEntry | str | None
"""A class with its id, the name of a class folder, or nothing known."""


TRAINING_SPLITS = ("train", "training")
SPLITS = (*TRAINING_SPLITS, "val", "valid", "validation", "test", "testing", "dev")
"""Names of folders that are parts of a data set, and not classes, where two or more of them are side by side."""


def natural_key(text: str) -> list[str | tuple[int, str]]:
    """Sort key that orders numbers inside names by value, n1_2 before n1_10, however long they are."""
    parts = re.split(r"([0-9]+)", text)
    return [(len(number := part.lstrip("0")), number) if i % 2 else part for i, part in enumerate(parts)]


class Layout(NamedTuple):
    """What the folders of a source mean."""

    folders: list[str | None]
    """The class folder of each path, None for one that is in none."""
    insides: list[str]
    """The rest of each path, inside its class folder."""
    splits: list[str | None]
    """The split of each path, such as "train"; None for all where there are no splits."""
    level: int
    """Number of folders above the class folders."""


def class_folders(members: Sequence[str]) -> Layout:
    """Find the class folder of each path.

    Class folders are inside whatever single folder holds everything, and inside the folders of splits such as
    train and val. A folder with a WordNet id holds no classes, nor does one with more images in itself than in its
    subfolders. Numbered folders of a thousand images each, as EDM and StyleGAN write them, are no classes.
    """
    paths = [path_parts(member) for member in members]
    splits: list[str | None] = [None] * len(paths)
    level = 0
    while True:
        inside = [parts for parts in paths if len(parts) > level + 1]
        names = {parts[level] for parts in inside}
        if not any(splits) and sum(name.casefold() in SPLITS for name in names) > 1:
            splits = [parts[level] if len(parts) > level + 1 else None for parts in paths]
            level += 1
            continue
        deeper = sum(len(parts) > level + 2 for parts in inside)
        if len(names) != 1 or names <= _by_wnid().keys() or deeper <= len(inside) / 2:
            break
        level += 1
    folders = [class_name(parts[level]) if len(parts) > level + 1 else None for parts in paths]
    if len(names) > 1 and all(_counts_thousands(parts[level], parts[-1]) for parts in inside):
        folders = [None] * len(paths)
    insides = [
        "/".join(parts if folder is None else parts[level + 1 :]) for parts, folder in zip(paths, folders, strict=True)
    ]
    return Layout(folders, insides, splits, level)


def _counts_thousands(folder: str, file: str) -> bool:
    """Whether a folder is named after the thousand to which the number of a file in it belongs."""
    number = re.fullmatch(r"(?:img)?([0-9]{5,12})\.\w+", file)
    if not number or not re.fullmatch(r"[0-9]{5,12}", folder):
        return False
    return int(folder) in (int(number[1]) // 1000, int(number[1]) // 1000 * 1000)


def source_labels(
    source: Source, members: Sequence[str], folders: Sequence[str | None], required: bool = False
) -> list[Label]:
    """Labels of a source's images, from its dataset.json, names as `var sample` writes them, folders or sidecar files.

    A single folder around all images is a class only if its name is a WordNet id, or if labels are `required` and
    found nowhere else. If they are required, several class folders are the only source of labels, and what is
    in none of them has none.

    Raises:
        InputError: the source has a damaged dataset.json.
    """
    listed = _listed_labels(source, members)
    if listed is not None:
        return listed
    single = len({*folders}) == 1 and folders[0] not in _by_wnid()
    if required and not single:
        return list(folders)
    labels = [
        in_name or (None if single else folder) or _sidecar_label(source, member)
        for member, in_name, folder in zip(members, _filename_labels(members), folders, strict=True)
    ]
    return list(folders) if required and not any(labels) else labels


def _listed_labels(source: Source, members: Sequence[str]) -> list[Label] | None:
    """The class of each image in a dataset.json of StyleGAN's or EDM's kind; None where there is no such file.

    It holds ``{"labels": [["00000/img00000000.png", 6], …]}``, or null instead of the list where there are no labels,
    and is at the top, or in a folder that is around all images.
    """
    paths = [path_parts(member) for member in members]
    around = path_parts(os.path.commonpath(["/".join(parts[:-1]) for parts in paths]))
    try:
        for level in range(len(around) + 1):
            content = parse_json(source.dataset_json(around[:level]) or b"null")
            if isinstance(content, dict) and "labels" in content:  # else another file of that name
                listed = {str(name): int(operator.index(number)) for name, number in content["labels"] or ()}
                return [numbered_class(listed.get("/".join(parts[level:]), -1)) for parts in paths]
        return None
    except (*ARCHIVE_ERRORS, OSError) as error:
        raise InputError(
            f"{source.name} has a dataset.json that cannot be used: {error}; expected a list of paths and whole numbers"
        ) from error


def stored_provenance(text: str) -> Provenance | None:
    """The provenance in a text; None if it is none."""
    with suppress(InputError):
        return provenance_from_json(text, "")
    return None


def provenance_label(provenance: Provenance) -> ClassEntry | None:
    """The class in a provenance; None of an image without a class."""
    return None if provenance.class_id is None else class_entry(provenance.class_id, provenance.class_name)


def class_entry(class_id: int, name: str) -> ClassEntry:
    """A class of this id and name: ImageNet's own if it is that, perhaps spelt as in file names."""
    if class_id in imagenet():
        known = imagenet().by_id(class_id)
        if name in (known.name, file_words(known.name)):
            return known
    return ClassEntry(class_id, name, name)


def numbered_class(class_id: int) -> ClassEntry | None:
    """A class known only by its number; None for a negative number."""
    return ClassEntry(class_id, str(class_id), str(class_id)) if class_id >= 0 else None


def class_table(labels: Sequence[Label]) -> tuple[ClassTable, list[int]]:
    """A table of all classes, and each image's position in it, -1 where the class is not known.

    If all class folders have WordNet ids of ImageNet, they are its classes; if all are whole numbers, these are
    the ids. Otherwise they are numbered in natural order, after the ids that are known.
    """
    folders = {label for label in labels if isinstance(label, str)}
    with_ids = _by_wnid() if folders <= _by_wnid().keys() else _by_number(folders)
    known = [with_ids.get(label, label) if isinstance(label, str) else label for label in labels]
    by_id = _by_id(label for label in known if isinstance(label, ClassEntry))
    first = max(by_id, default=-1) + 1
    by_folder = {
        name: ClassEntry(first + i, name, name.replace("_", " "))
        for i, name in enumerate(sorted(folders - with_ids.keys(), key=natural_key))
    }
    table = ClassTable((*by_id.values(), *by_folder.values()))
    entries = [by_folder[label] if isinstance(label, str) else label for label in known]
    return table, [-1 if entry is None else table.label(entry.id) for entry in entries]


def class_name(folder: str) -> str:
    """A folder's name as text: composed letters, which macOS decomposes, and no bytes that are no letters."""
    return unicodedata.normalize("NFC", folder.encode(errors="replace").decode())


def _filename_labels(members: Sequence[str]) -> list[ClassEntry | None]:
    """The classes in names such as ``207-golden_retriever-0.png``.

    Other files may look the same, so each id must have one name, and each name that is not ImageNet's one id.
    """
    names = [path_parts(member)[-1] for member in members]
    matches = [re.fullmatch(r"([0-9]{1,18})-(.*[^\W\d_].*)-[0-9]+\.png", name) for name in names]
    entries = {class_entry(int(match[1]), match[2]) for match in matches if match}
    by_id = {entry.id: entry for entry in entries}
    others = [entry.name for entry in entries if entry.wnid == entry.name]
    if len(by_id) < len(entries) or len(set(others)) < len(others):
        return [None] * len(names)
    return [by_id[int(match[1])] if match else None for match in matches]


def _sidecar_label(source: Source, member: str) -> ClassEntry | None:
    """The class in the provenance stored beside an image, or in its ``.cls``."""
    if stored := source.sidecar(member, "json"):
        provenance = stored_provenance(stored.decode(errors="replace"))
        if provenance and (label := provenance_label(provenance)):
            return label
    with suppress(ValueError):
        return numbered_class(int(source.sidecar(member, "cls") or b""))
    return None


def _by_number(folders: set[str]) -> dict[str, ClassEntry]:
    """Classes whose ids are the names of their folders; none unless all are whole numbers, and different ones."""
    if not all(re.fullmatch(r"[0-9]{1,18}", name) for name in folders) or len(set(map(int, folders))) < len(folders):
        return {}
    return {name: ClassEntry(int(name), name, name) for name in folders}


@lru_cache(maxsize=1)
def _by_wnid() -> dict[str, ClassEntry]:
    return {entry.wnid: entry for entry in imagenet().entries}


def _by_id(entries: Iterable[ClassEntry]) -> dict[int, ClassEntry]:
    """Classes in order of their ids; one known only by its number takes the name that another has for it."""
    by_id: dict[int, ClassEntry] = {}
    for entry in sorted(set(entries), key=lambda entry: (entry.id, entry.name == str(entry.id), entry.name)):
        by_id.setdefault(entry.id, entry)
    return by_id
