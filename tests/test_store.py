"""Checkpoint files: what goes in comes out, and what does not belong is refused in one line."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from support import reference
from varcli.checkpoints import store
from varcli.checkpoints.conversion import class_table
from varcli.checkpoints.safetensors_io import load_header, load_tensors, save_tensors, tensors_sha256
from varcli.errors import CheckpointError, RunError


@pytest.fixture(scope="module")
def mini():
    return reference.load("mini")


@pytest.fixture(scope="module")
def classes(mini):
    return class_table(mini.transformer.config.class_count)


@pytest.fixture(scope="module")
def model_file(mini, classes, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "mini.safetensors"
    store.save_model(path, mini.tokenizer, mini.transformer, classes, {"epochs": 3})
    return path


def same_state(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rewritten(model_file, tmp_path, tensors=None, metadata=None):
    """Return a copy of the model file with some tensors or metadata changed; None removes."""
    kept, facts = load_tensors(model_file)
    kept |= tensors or {}
    facts |= metadata or {}
    path = tmp_path / "changed.safetensors"
    save_file({k: v for k, v in kept.items() if v is not None}, path, {k: v for k, v in facts.items() if v is not None})
    return path


def test_model_round_trip(original, tmp_path):
    path = tmp_path / "model.safetensors"
    classes = class_table(original.transformer.config.class_count)
    store.save_model(path, original.tokenizer, original.transformer, classes, {"epochs": 3})
    loaded = store.load_model(path)
    assert same_state(loaded.tokenizer, original.tokenizer)
    assert same_state(loaded.transformer, original.transformer)
    assert loaded.transformer.config == original.transformer.config
    assert loaded.tokenizer.config == original.tokenizer.config
    assert loaded.classes == classes
    assert loaded.run == {"epochs": 3}
    assert not loaded.transformer.training
    assert not loaded.tokenizer.training


def test_tokenizer_round_trip(mini, model_file, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    store.save_tokenizer(path, mini.tokenizer, {})
    for file in (path, model_file):
        loaded = store.load_tokenizer(file)
        assert same_state(loaded, mini.tokenizer)
        assert store.tokenizer_sha256(loaded) == store.read_metadata(file)[0]["tokenizer_sha256"]


def test_loaded_weights_can_be_trained_without_touching_the_file(model_file):
    before = model_file.read_bytes()
    loaded = store.load_model(model_file)
    with torch.no_grad():
        for parameter in [*loaded.transformer.parameters(), *loaded.tokenizer.parameters()]:
            assert parameter.requires_grad
            parameter.add_(1)
    assert model_file.read_bytes() == before


def test_half_precision_comes_up_as_float32(mini, classes, tmp_path):
    path = tmp_path / "half.safetensors"
    store.save_model(path, mini.tokenizer, mini.transformer, classes, {}, torch.bfloat16)
    loaded = store.load_model(path)
    head = mini.transformer.head.weight.detach()
    assert loaded.transformer.head.weight.dtype == torch.float32
    assert torch.equal(loaded.transformer.head.weight, head.bfloat16().float())
    assert loaded.transformer.lvl_1L.dtype == torch.int64
    assert store.tokenizer_sha256(loaded.tokenizer) == store.read_metadata(path)[0]["tokenizer_sha256"]


def test_building_draws_no_initial_weights(model_file):
    state = torch.random.get_rng_state()
    store.load_tokenizer(model_file)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.nn.Linear(2, 2).weight.abs().sum() > 0


def test_names_are_those_of_the_released_files(model_file):
    tensors, metadata = load_header(model_file)
    released = json.loads((reference.FIXTURES / "mini.keys.json").read_text())
    expected = {f"tokenizer.{name}" for name in released["vae"]} | {f"transformer.{name}" for name in released["var"]}
    assert set(tensors) == {name for name in expected if name.rpartition(".")[2] not in store.DERIVED}
    assert metadata["varcli"] == store.FORMAT_VERSION
    assert metadata["kind"] == "model"


def test_same_contents_same_hash(mini, classes, model_file, tmp_path):
    path = tmp_path / "again.safetensors"
    store.save_model(path, mini.tokenizer, mini.transformer, classes, {"epochs": 4})
    assert store.load_model(path).sha256 == store.load_model(model_file).sha256
    store.save_model(path, mini.tokenizer, mini.transformer, classes, {}, torch.float16)
    assert store.load_model(path).sha256 != store.load_model(model_file).sha256


@pytest.mark.parametrize("size", [0, 4, 100, -100_000, -1])
def test_truncated_file(model_file, tmp_path, size):
    path = tmp_path / "truncated.safetensors"
    path.write_bytes(model_file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"truncated\.safetensors cannot be read"):
        store.load_model(path)


@pytest.mark.parametrize("name", ["missing.safetensors", ".", "text.txt"])
def test_foreign_file(tmp_path, name):
    (tmp_path / "text.txt").write_text("a text that is longer than a header of eight bytes")
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.load_model(tmp_path / name)


def test_safetensors_of_something_else(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not written by varcli"):
        store.load_model(tmp_path / "other.safetensors")


def test_tokenizer_file_where_a_model_is_needed(mini, tmp_path):
    store.save_tokenizer(tmp_path / "tokenizer.safetensors", mini.tokenizer, {})
    with pytest.raises(CheckpointError, match="holds a tokenizer, a model is needed"):
        store.load_model(tmp_path / "tokenizer.safetensors")


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({"transformer.head.bias": None}, "tensor head.bias is missing"),
        ({"tokenizer.quant_conv.bias": None}, "tensor quant_conv.bias is missing"),
        ({"transformer.extra": torch.zeros(1)}, "tensor extra belongs to no part"),
        ({"optimizer.head.bias": torch.zeros(1)}, "tensor optimizer.head.bias belongs to no part"),
        ({"transformer.head.bias": torch.zeros(3)}, "tensor head.bias is 3 instead of"),
    ],
)
def test_tensors_that_do_not_fit(model_file, tmp_path, tensors, line):
    with pytest.raises(CheckpointError, match=line):
        store.load_model(rewritten(model_file, tmp_path, tensors))


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ({"varcli": "2"}, "format 2 needs a newer varcli"),
        ({"kind": "sandwich"}, "holds a sandwich, a model is needed"),
        ({"transformer_config": "{"}, "metadata cannot be used"),
        ({"transformer_config": None}, "metadata cannot be used"),
        ({"tokenizer_config": '{"sides": 3}'}, "metadata cannot be used"),
        ({"classes": "[]"}, "class table: 0 rows"),
        ({"classes": "7"}, "class table"),
        ({"run": "nothing"}, "metadata cannot be used"),
        ({"sha256": None}, "metadata cannot be used"),
    ],
)
def test_metadata_that_cannot_be_used(model_file, tmp_path, metadata, line):
    with pytest.raises(CheckpointError, match=line) as caught:
        store.load_model(rewritten(model_file, tmp_path, metadata=metadata))
    assert "\n" not in str(caught.value)


def test_tokenizer_of_another_transformer(mini, classes, tmp_path):
    other = reference.load("mini_shared").tokenizer
    with pytest.raises(CheckpointError, match="tokenizer of another transformer: sides"):
        store.save_model(tmp_path / "x.safetensors", other, mini.transformer, classes, {})
    with pytest.raises(CheckpointError, match="class table: 3 rows"):
        store.save_model(tmp_path / "x.safetensors", mini.tokenizer, mini.transformer, class_table(3), {})


def test_unwritable_folder(tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        save_tensors(tmp_path / "none" / "x.safetensors", {"a": torch.zeros(1)}, {})
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="no umask and no limit on file sizes")
def test_permissions_follow_the_umask(tmp_path):
    kept = os.umask(0o022)
    try:
        save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {})
    finally:
        os.umask(kept)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no limit on file sizes")
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    script = """
        import resource, sys, pathlib, torch
        from varcli.checkpoints.safetensors_io import save_tensors
        from varcli.errors import RunError
        path = pathlib.Path(sys.argv[1])
        save_tensors(path, {"a": torch.zeros(3)}, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            save_tensors(path, {"a": torch.zeros(100_000)}, {})
        except RunError as error:
            assert "cannot be written" in str(error)
            sys.exit(5)
    """
    path = tmp_path / "x.safetensors"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], check=False)
    assert done.returncode == 5
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert load_tensors(path)[0]["a"].shape == (3,)


def test_hash_sees_names_shapes_and_bytes_but_not_the_order():
    a, b = torch.arange(4.0), torch.arange(2)
    whole = tensors_sha256({"a": a, "b": b})
    assert whole == tensors_sha256({"b": b, "a": a.clone()})
    others = [{"a": a, "c": b}, {"a": a.view(2, 2), "b": b}, {"a": a + 1, "b": b}, {"a": a.half(), "b": b}]
    assert whole not in [tensors_sha256(other) for other in others]
    assert tensors_sha256({"s": torch.tensor(1.5)}) != tensors_sha256({"s": torch.tensor(2.5)})
