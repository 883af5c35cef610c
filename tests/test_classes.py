"""Classes: what a user may type, and what a checkpoint that lacks a class says."""

import itertools
import subprocess
import sys
from collections import Counter
from contextlib import suppress

import pytest

from varcli.classes import RANDOM, ClassEntry, ClassTable, imagenet, parse_classes, random_class
from varcli.errors import CheckpointError, InputError, UsageError

FEW = ClassTable(tuple(imagenet().entries[i] for i in (1, 151, 207, 208, 235, 281, 283, 285, 517, 951)))
PETS = ClassTable((ClassEntry(0, "cats, all", "cats, all"), ClassEntry(1, "dogs", "dogs")))


def ids(specs, table=None, lines=()):
    table = table or imagenet()
    return [entry and entry.id for entry in parse_classes(specs, table, lines)]


def test_imagenet_is_the_thousand_classes():
    table = imagenet()
    assert len(table) == 1000
    assert [entry.id for entry in table.entries] == list(range(1000))
    assert table.by_id(207).wnid == "n02099601"
    assert table.by_id(0).names == ("tench", "Tinca tinca")


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("207", [207]),
        (" 207 ", [207]),
        ("golden retriever", [207]),
        ("Golden_Retriever", [207]),
        ("golden-retriever", [207]),
        ("n02099601", [207]),
        ("golden", [207]),  # a part only one class has
        ("Tinca tinca", [0]),  # a synonym
        ("tench, Tinca tinca", [0]),  # all names as ImageNet's list has them: no list of two
        ("tiger", [292]),  # a whole name goes before tiger cat and tiger shark
        ("1,5,207", [1, 5, 207]),
        ("tabby, none,3-5", [281, None, 3, 4, 5]),
        ("10-12", [10, 11, 12]),
        ("7-7", [7]),
        ("all", list(range(1000))),
        ("none", [None]),
        ("NONE", [None]),
        ("random", [RANDOM.id]),
    ],
)
def test_spec_means(spec, found):
    assert ids([spec]) == found


NAMED = ClassTable(
    tuple(
        ClassEntry(3 * i, name, name) for i, name in enumerate(("C++", "C#", "c", "10-20", "a, b", "A/B", "all", "9"))
    )
)


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("C++", [0]),
        ("c++", [0]),
        ("C#", [3]),
        ("c", [6]),
        ("C", [6]),
        ("10-20", [9]),
        ("a, b", [12]),
        ("A/B", [15]),
        ("a/b", [15]),
        ("9", [9]),  # numbers are always ids
        ("18", [18]),
        ("all", [3 * i for i in range(8)]),
    ],
)
def test_a_name_that_is_equal_letter_by_letter_goes_first(spec, found):
    assert ids([spec], NAMED) == found


@pytest.mark.parametrize("spec", ["1" * 5000, "-" + "1" * 5000, "1-" + "2" * 5000])
def test_endless_numbers_are_no_class(spec):
    with pytest.raises(InputError, match="there is no class called"):
        ids([spec])


def test_specs_keep_their_order_and_repetitions():
    assert ids(["207", "none", "1-2", "207"]) == [207, None, 1, 2, 207]


def test_name_with_a_comma_is_no_list():
    assert ids(["cats, all"], PETS) == [0]
    assert ids(["cats all,dogs"], PETS) == [0, 1]


@pytest.mark.parametrize(
    ("spec", "table", "kind", "words"),
    [
        ("20-10", imagenet(), UsageError, "20-10"),
        ("", imagenet(), UsageError, "got nothing"),
        ("1,,2", imagenet(), UsageError, "got nothing"),
        ("1000", imagenet(), InputError, "knows 0 to 999"),
        ("990-1001", imagenet(), InputError, "1000"),
        ("-3", imagenet(), InputError, "-3"),
        ("crane", imagenet(), InputError, "134 crane, 517 crane"),
        ("cat", imagenet(), InputError, "281 tabby"),
        ("gldn retriever", imagenet(), InputError, "close to it: 207 golden retriever"),
        ("zzzz", imagenet(), InputError, "var classes"),
        (
            "nothing of the kind",
            imagenet(),
            InputError,
            "knows 0 to 999; `var classes` with the same --checkpoint lists them",
        ),
        ("asdfgh", imagenet(), InputError, "knows 0 to 999; `var classes` with the same --checkpoint lists them"),
        ("retreiver", imagenet(), InputError, "close to it: 205 flat-coated retriever, 206 curly-coated retriever"),
        ("2", FEW, InputError, "2 great white shark"),
        ("206", FEW, InputError, "207 golden retriever, 208 Labrador retriever"),
        ("curly-coated retriever", FEW, InputError, "207 golden retriever, 208 Labrador retriever"),
        ("1-3", FEW, InputError, "2 great white shark"),
        ("tiger", FEW, InputError, "292 tiger"),
        ("piano", FEW, InputError, "579 grand piano"),
        ("5000", FEW, InputError, "10 classes between 1 and 951"),
        ("golden retriever", PETS, InputError, "this checkpoint knows 0 cats, all, 1 dogs"),
        ("dogss", PETS, InputError, "dogs"),
        ("dog house", PETS, InputError, "this checkpoint knows 0 cats, all, 1 dogs"),
        ("7", PETS, InputError, "this checkpoint knows 0 cats, all, 1 dogs"),
    ],
)
def test_spec_refused(spec, table, kind, words):
    with pytest.raises(kind, match=r"class|checkpoint does not know") as caught:
        parse_classes([spec], table, hint="var-d16 has all")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_known_by_a_part_of_its_name_is_told():
    told = []
    for spec in ("shepherd", "golden retriever,alsatian,4tabby", "-"):
        with suppress(InputError):
            list(parse_classes([spec], FEW, ["goldf", "1"], note=told.append))
    assert [line.partition(" (")[0] for line in told] == [
        "--class shepherd is taken to be 235",
        "--class goldf is taken to be 1",
    ]
    assert "German shepherd dog" in told[0], "the name that has the part, first or not"


def test_lacking_class_says_who_has_it():
    with pytest.raises(InputError, match=r"German shepherd.*; var-d16 has all$"):
        parse_classes(["siberian husky"], FEW, hint="var-d16 has all")
    with pytest.raises(InputError) as caught:
        parse_classes(["nothing of the kind"], FEW, hint="var-d16 has all")
    assert "var-d16" not in str(caught.value)


def test_every_spec_is_checked_before_the_first_class_is_given():
    with pytest.raises(InputError):
        parse_classes(["1", "-", "zzzz"], imagenet(), lines=["2"])


def test_lines_are_read_when_their_turn_comes():
    endless = (f"{i}\n" for i in itertools.count())
    found = parse_classes(["5", "-"], imagenet(), endless)
    assert [entry.id for entry in itertools.islice(found, 4)] == [5, 0, 1, 2]
    assert next(endless) == "3\n"


def test_lines_take_what_arguments_take():
    assert ids(["-"], lines=["golden retriever\r\n", "\n", "  \n", "none\n", "1,2\n", "4-5"]) == [207, None, 1, 2, 4, 5]
    with pytest.raises(InputError):
        ids(["-"], lines=["1", "-"])


def test_table_knows_rows():
    assert FEW.label(207) == 2
    assert FEW.by_id(951).name == "lemon"
    assert 207 in FEW
    assert 2 not in FEW
    with pytest.raises(InputError, match="no class 2"):
        FEW.label(2)


def test_search_puts_the_most_literal_first():
    assert [entry.id for entry in imagenet().search("tiger")][:1] == [292]
    assert {entry.id for entry in imagenet().search("tiger")} >= {3, 282, 292}
    assert [entry.id for entry in imagenet().search("Retriever golden")] == [207]
    assert imagenet().search("zzzz") == []


def test_random_class_follows_from_the_seed():
    drawn = [random_class(FEW, seed).id for seed in range(2000)]
    assert drawn[:5] == [random_class(FEW, seed).id for seed in range(5)]
    counts = Counter(drawn)
    assert set(counts) == {entry.id for entry in FEW.entries}
    assert min(counts.values()) > 140  # of 200 expected


@pytest.mark.parametrize("table", [imagenet(), FEW, PETS], ids=["imagenet", "few", "pets"])
def test_json_brings_the_table_back(table):
    again = ClassTable.from_json(table.to_json())
    assert again == table
    assert again.entries == table.entries


@pytest.mark.parametrize("text", ["", "{}", "7", "[[1]]", '[["a", "b", ["c"]]]', "[[1, 2, []]]", "null"])
def test_damaged_json_is_a_bad_checkpoint(text):
    if text == "{}":
        assert len(ClassTable.from_json(text)) == 0
        return
    with pytest.raises(CheckpointError, match="class table"):
        ClassTable.from_json(text)


def test_classes_need_neither_torch_nor_numpy():
    code = "import sys, varcli.classes as c; c.imagenet(); print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"
