"""Classes from folders and names, and one table of all."""

import pytest

from support.provenances import made
from varcli.classes import ClassEntry, imagenet
from varcli.images.labels import class_entry, class_folders, class_table, natural_key, numbered_class, source_labels
from varcli.images.provenance import image_filename
from varcli.images.sources import FileListSource

RETRIEVER = imagenet().by_id(207)


def labels_of(members, required=False):
    return source_labels(FileListSource(members), members, class_folders(members)[0], required)


def test_natural_order():
    assert sorted(["n1_10", "n1_2", "n10_1", "n2_1"], key=natural_key) == ["n1_2", "n1_10", "n2_1", "n10_1"]


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
    assert labels_of(members) == labels


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        (["cats/207-golden_retriever-0.png", "dogs/1-goldfish-0.png"], ["cats", "dogs"]),
        (["cats/1.png", "dogs/2.png", "3.png"], ["cats", "dogs", None]),
        (["cats/1.png", "cats/2.png"], ["cats", "cats"]),
        (["out/207-golden_retriever-0.png", "out/none-1.png"], [RETRIEVER, None]),
        (["1.png", "2.png"], [None, None]),
    ],
)
def test_labels_for_training_come_from_class_folders_first(members, labels):
    assert labels_of(members, required=True) == labels


def test_every_class_of_imagenet_is_known_by_the_names_of_its_samples():
    entries = imagenet().entries
    names = [image_filename(made(class_id=entry.id, class_name=entry.name)) for entry in entries]
    assert labels_of(names) == list(entries)


def test_class_of_an_id_and_a_name():
    assert class_entry(207, "golden retriever") == class_entry(207, "golden_retriever") == RETRIEVER
    assert class_entry(207, "my dog") == ClassEntry(207, "my dog", "my dog")
    assert class_entry(4000, "x") == ClassEntry(4000, "x", "x")


def test_labels_are_in_order_of_ids():
    table, labels = class_table(["n02099601", None, "n01443537", "n02099601"])
    assert [(entry.id, entry.name) for entry in table.entries] == [(1, "goldfish"), (207, "golden retriever")]
    assert labels == [1, -1, 0, 1]


def test_folders_are_numbered_in_natural_order():
    table, labels = class_table(["c10", "c2", "c10"])
    assert [(entry.id, entry.name) for entry in table.entries] == [(0, "c2"), (1, "c10")]
    assert labels == [1, 0, 1]


def test_folders_are_classes_of_imagenet_all_or_none():
    table, labels = class_table(["n02099601", "cats", "my_dog"])
    assert [(entry.id, entry.name) for entry in table.entries] == [(0, "cats"), (1, "my dog"), (2, "n02099601")]
    assert labels == [2, 0, 1]


def test_numbers_take_the_names_that_others_have_for_them():
    table, labels = class_table([numbered_class(207), RETRIEVER, numbered_class(8), numbered_class(-1), "birds"])
    assert [(entry.id, entry.name) for entry in table.entries] == [(8, "8"), (207, "golden retriever"), (208, "birds")]
    assert labels == [1, 1, 0, -1, 2]


def test_no_classes():
    table, labels = class_table([None, None])
    assert (len(table), labels) == (0, [-1, -1])
