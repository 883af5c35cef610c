"""`var classes`: which classes there are and which a checkpoint knows."""

import json

import pytest

from support import small
from varcli import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small.save(tmp_path_factory.mktemp("model") / "small.safetensors"))


def rows(capsys):
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_without_words_what_the_checkpoint_knows(model, capsys):
    assert cli.run(["classes", "-m", model]) == 0
    listed = rows(capsys)
    assert [int(row[0]) for row in listed] == list(small.CLASSES)
    assert listed[1] == ["207", "n02099601", "yes", "golden retriever"]


def test_words_search_all_of_imagenet(model, capsys):
    assert cli.run(["classes", "retriever", "-m", model]) == 0
    known = {row[3]: row[2] for row in rows(capsys)}
    assert len(known) == 5
    assert [name for name, answer in known.items() if answer == "yes"] == ["golden retriever"]


def test_a_released_checkpoint_need_not_be_here(capsys):
    assert cli.run(["classes", "golden", "retriever", "-m", "var-d36", "--json"]) == 0
    [found] = map(json.loads, capsys.readouterr().out.splitlines())
    assert found == {"id": 207, "wnid": "n02099601", "names": ["golden retriever"], "known": True}


def test_an_index_finds_its_class(model, capsys):
    assert cli.run(["classes", "281", "-m", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"][0] == "tabby"
    assert cli.run(["classes", "1000", "-m", model]) == 3  # ImageNet has no such index
    assert cli.run(["classes", "9" * 5000, "-m", model]) == 3  # which Python does not even read


def test_nothing_found(model, capsys):
    assert cli.run(["classes", "zeppelin", "-m", model]) == 3
    assert capsys.readouterr().err == ("var: error: no class name has the words zeppelin: try fewer or shorter words\n")


def test_a_tokenizer_has_no_classes(tmp_path, capsys, model):
    from varcli.checkpoints.store import load_tokenizer, save_tokenizer

    path = tmp_path / "tokenizer.safetensors"
    save_tokenizer(path, load_tokenizer(model), {})
    assert cli.run(["classes", "-m", str(path)]) == 4
    assert "is a tokenizer and has no classes" in capsys.readouterr().err
