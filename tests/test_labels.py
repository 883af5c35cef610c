"""Classes from folders and names, and one table of all."""

import pytest

from support.provenances import made
from varcli.classes import ClassEntry, imagenet
from varcli.images.labels import entry_of, labels_by_name, numbered, rows_of
from varcli.images.provenance import image_filename

RETRIEVER = imagenet().by_id(207)


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        (["cats/1.png", "dogs/2.png"], ["cats", "dogs"]),
        (["set/cats/1.png", "set/dogs/2.png"], ["cats", "dogs"]),
        (["cats\\1.png", "dogs\\2.png"], ["cats", "dogs"]),
        (["1.png", "2.png"], [None, None]),
        (["samples/1.png", "samples/2.png"], [None, None]),
        (["/data/n02099601/1.JPEG", "/data/n02099601/2.JPEG"], ["n02099601"] * 2),
        (["n02099601/1.JPEG", "n01443537/2.JPEG"], ["n02099601", "n01443537"]),
        (["207-golden_retriever-0.png", "none-1.png"], [RETRIEVER, None]),
        (["207-golden_retriever-0.png", "3-my_cats-1.png"], [RETRIEVER, ClassEntry(3, "my_cats", "my_cats")]),
        (["out/207-golden_retriever-0.png", "more/207-golden_retriever-1.png"], [RETRIEVER, RETRIEVER]),
        (["1-run-0.png", "2-run-0.png"], [None, None]),
        (["7-red-0.png", "7-blue-0.png"], [None, None]),
        (["2024-01-05.png", "207-0.png", "golden_retriever-0.png"], [None, None, None]),
    ],
)
def test_what_names_say(members, labels):
    assert labels_by_name(members) == labels


def test_every_class_of_imagenet_is_known_by_the_names_of_its_samples():
    entries = imagenet().entries
    names = [image_filename(made(class_id=entry.id, class_name=entry.name)) for entry in entries]
    assert labels_by_name(names) == list(entries)


def test_a_class_of_this_id_and_name():
    assert entry_of(207, "golden retriever") == entry_of(207, "golden_retriever") == RETRIEVER
    assert entry_of(207, "my dog") == ClassEntry(207, "my dog", "my dog")
    assert entry_of(4000, "x") == ClassEntry(4000, "x", "x")


def test_rows_are_in_order_of_ids():
    table, rows = rows_of(["n02099601", None, "n01443537", "n02099601"])
    assert [(entry.id, entry.name) for entry in table.entries] == [(1, "goldfish"), (207, "golden retriever")]
    assert rows == [1, -1, 0, 1]


def test_folders_are_numbered_in_natural_order():
    table, rows = rows_of(["c10", "c2", "c10"])
    assert [(entry.id, entry.name) for entry in table.entries] == [(0, "c2"), (1, "c10")]
    assert rows == [1, 0, 1]


def test_numbers_take_the_names_that_others_have_for_them():
    table, rows = rows_of([numbered(207), RETRIEVER, numbered(8), numbered(-1), "birds"])
    assert [(entry.id, entry.name) for entry in table.entries] == [(8, "8"), (207, "golden retriever"), (208, "birds")]
    assert rows == [1, 1, 0, -1, 2]


def test_no_classes():
    table, rows = rows_of([None, None])
    assert (len(table), rows) == (0, [-1, -1])
