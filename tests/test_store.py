"""Checkpoint files: what goes in comes out, and what does not belong is refused in one line."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import reference
from varcli.checkpoints import safetensors_io, store
from varcli.checkpoints.conversion import class_table
from varcli.checkpoints.safetensors_io import load_header, load_tensors, save_tensors, tensors_sha256
from varcli.errors import CheckpointError, RunError
from varcli.pipelines.model import Model


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


def test_a_file_that_changes_later_changes_no_weights(model_file, tmp_path):
    """Nothing is mapped from it: a truncated file would end the process with SIGBUS."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_file.read_bytes())
    loaded = store.load_model(path)
    os.truncate(path, 0)
    assert same_state(loaded.transformer, store.load_model(model_file).transformer)


def test_a_file_that_is_replaced_before_its_weights_are_read_is_noticed(mini, classes, model_file, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_file.read_bytes())
    model, alone = (Model(str(path), path, torch.device("cpu"), "fp32") for _ in range(2))
    store.save_model(path, mini.tokenizer, mini.transformer, classes, {}, torch.float16)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was replaced by another one meanwhile"):
        model.load_weights()
    with pytest.raises(CheckpointError, match="was replaced"):
        _ = alone.tokenizer


def test_a_file_that_changes_while_it_is_read_is_refused(model_file, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_file.read_bytes())

    def header(file):
        os.utime(path, (1, 1))  # as another process's writing does
        return original(file)

    original = safetensors_io._header
    monkeypatch.setattr(safetensors_io, "_header", header)
    with pytest.raises(CheckpointError, match="it was changed while it was read"):
        store.load_model(path)


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


@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    for read in (load_tensors, load_header):
        with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read: it is not a file"):
            read(tmp_path / "x.safetensors")


def test_safetensors_of_something_else(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not written by varcli"):
        store.load_model(tmp_path / "other.safetensors")


def test_tokenizer_file_where_a_model_is_needed(mini, tmp_path):
    store.save_tokenizer(tmp_path / "tokenizer.safetensors", mini.tokenizer, {})
    with pytest.raises(CheckpointError, match="holds a tokenizer, and a model is needed"):
        store.load_model(tmp_path / "tokenizer.safetensors")


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({"transformer.head.bias": None}, "no tensor head.bias"),
        ({"tokenizer.quant_conv.bias": None}, "no tensor quant_conv.bias"),
        ({"transformer.extra": torch.zeros(1)}, "unexpected tensor extra"),
        ({"optimizer.head.bias": torch.zeros(1)}, "unexpected tensor optimizer.head.bias"),
        ({"transformer.head.bias": torch.zeros(3)}, "tensor head.bias of 3 instead of"),
    ],
)
def test_tensors_that_do_not_fit(model_file, tmp_path, tensors, line):
    with pytest.raises(CheckpointError, match=line):
        store.load_model(rewritten(model_file, tmp_path, tensors))


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("transformer.head.bias", lambda t: t.int(), "tensor head.bias of int32: floating-point numbers are needed"),
        ("transformer.head.bias", lambda t: t.bool(), "tensor head.bias of bool: floating-point numbers are needed"),
        (
            "transformer.head.bias",
            lambda t: t.log() * torch.nan,
            " values in transformer.head.bias that are not finite",
        ),
        ("transformer.head.bias", lambda t: t.index_fill(0, torch.tensor([3]), torch.inf), "1 values in transformer"),
        (
            "transformer.head.bias",
            lambda t: t.index_copy(0, torch.tensor([1, 2]), torch.tensor([1, -1]) / 0),
            "2 values",
        ),
        (
            "tokenizer.quant_conv.bias",
            lambda t: t - torch.inf,
            " values in tokenizer.quant_conv.bias that are not finite",
        ),
    ],
)
def test_values_that_cannot_be_computed_with(model_file, tmp_path, name, change, line):
    with pytest.raises(CheckpointError, match=line):
        store.load_model(rewritten(model_file, tmp_path, {name: change(load_tensors(model_file)[0][name])}))


def test_large_values_are_finite(model_file, tmp_path):
    large = {"transformer.head.bias": torch.full_like(load_tensors(model_file)[0]["transformer.head.bias"], 3e38)}
    assert store.load_model(rewritten(model_file, tmp_path, large)).transformer.head.bias[0] > 2e38


def with_header(path, text, content=b""):
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + content)
    return path


def one_tensor(**changes):
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "7",
        "[]",
        '{"a": 3}',
        '{"__metadata__": 3}',
        '{"__metadata__": {"varcli": 1}}',
        '{"__metadata__": {"varcli": "\\ud800"}}',
        one_tensor(shape=[3]),
        one_tensor(shape=[-2]),
        one_tensor(shape=[2.0]),
        one_tensor(shape=[True, 2]),
        one_tensor(shape="2"),
        one_tensor(shape=[2**62, 2**62, 0], data_offsets=[0, 0]),
        one_tensor(data_offsets=[8, 0]),
        one_tensor(data_offsets=[4, 12]),
        one_tensor(data_offsets=[0, 8, 16]),
        one_tensor(data_offsets=[0, 2**70]),
        one_tensor(dtype="F8"),
        one_tensor(dtype=None),
        one_tensor(more=1),
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        '"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    ],
)
def test_headers_that_make_no_sense(tmp_path, text):
    path = with_header(tmp_path / "x.safetensors", text, bytes(8))
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read: ") as caught:
        load_tensors(path)
    assert len(str(caught.value)) < 300


def test_what_the_library_writes_is_read_as_the_library_reads_it(tmp_path):
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    kinds += (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    shapes = ((3, 2), (), (0, 4), (5,))
    tensors = {f"{kind}{shape}": torch.ones(shape).to(kind) for kind in kinds for shape in shapes}
    save_file(tensors, tmp_path / "x.safetensors", {"é": "ü"})
    read, metadata = load_tensors(tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    assert metadata == {"é": "ü"} and read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) and read[name].dtype == expected[name].dtype for name in read)
    assert load_header(tmp_path / "x.safetensors")[0]["torch.bool(3, 2)"] == ("BOOL", (3, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ({"varcli": "2"}, "format 2, which needs a newer varcli"),
        ({"kind": "sandwich"}, "holds a sandwich, and a model is needed"),
        ({"transformer_config": "{"}, "the metadata of the checkpoint"),
        ({"transformer_config": None}, "the metadata of the checkpoint"),
        ({"tokenizer_config": '{"sides": 3}'}, "the metadata of the checkpoint"),
        ({"classes": "[]"}, "the class table has 0 classes"),
        ({"classes": "7"}, "class table"),
        ({"classes": "[" * 100_000}, "class table"),
        ({"classes": '[[1, "n", [5]]]'}, "class table"),
        ({"classes": '[[1, "n", "name"]]'}, "class table"),
        ({"classes": '[[1, "n", ["\\ud800"]]]'}, "class table"),
        ({"classes": '[[Infinity, "n", ["name"]]]'}, "class table"),
        ({"run": "[" * 100_000}, "the metadata of the checkpoint"),
        ({"transformer_config": "[" * 100_000}, "the metadata of the checkpoint"),
        ({"run": "nothing"}, "the metadata of the checkpoint"),
        ({"sha256": None}, "the metadata of the checkpoint"),
    ],
)
def test_metadata_that_cannot_be_used(model_file, tmp_path, metadata, line):
    with pytest.raises(CheckpointError, match=line) as caught:
        store.load_model(rewritten(model_file, tmp_path, metadata=metadata))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata", [{"classes": "5"}, {"transformer_config": "5"}, {"tokenizer_config": "["}, {"run": "[" * 100_000}]
)
def test_metadata_that_cannot_be_shown(model_file, tmp_path, metadata):
    with pytest.raises(CheckpointError, match=r"class table must be a list|the metadata of the checkpoint"):
        store.describe(rewritten(model_file, tmp_path, metadata=metadata))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "changes", "line"),
    [
        ("transformer", {"depth": 10**6}, "depth must be at most 512"),
        ("transformer", {"depth": 10**12}, "depth must be at most 512"),
        ("transformer", {"depth": 2.5}, "depth must be a whole number"),
        ("transformer", {"depth": True}, "depth must be a whole number"),
        ("transformer", {"depth": "2"}, "depth must be a whole number"),
        ("transformer", {"depth": 500}, "has no tensor"),
        ("transformer", {"width": 64.0}, "width must be a whole number"),
        ("transformer", {"width": 64 * 10**6}, "width must be at most"),
        ("transformer", {"class_count": 10**9}, "class count must be at most"),
        ("transformer", {"shared_adaln": 3}, "shared-adaln must be true or false"),
        ("transformer", {"sides": [1, 2.5]}, "sides must be a whole number"),
        ("transformer", {"sides": [1, 10**5]}, "sides must be at most 256"),
        ("transformer", {"sides": list(range(1, 30000))}, "sides must be at most 256"),
        ("transformer", {"sides": 3}, "the metadata of the checkpoint"),
        ("tokenizer", {"codebook_size": 10**12}, "codebook size must be at most"),
        ("tokenizer", {"base_width": 32 * 10**5}, "base width must be at most"),
        ("tokenizer", {"multipliers": [1] * 10**5}, "multipliers must be at most 8 numbers up to 64"),
        ("tokenizer", {"multipliers": [10**9]}, "multipliers must be at most 8 numbers up to 64"),
        ("tokenizer", {"encoder_blocks": 10**8}, "encoder blocks must be at most"),
        ("tokenizer", {"kernel_count": 10**8}, "kernel count must be at most"),
        ("tokenizer", {"base_width": 4096, "multipliers": [64] * 3}, "not fit into memory|no tensor|instead of"),
    ],
)
def test_absurd_configurations_cost_nothing(model_file, tmp_path, part, changes, line):
    text = load_header(model_file)[1][f"{part}_config"]
    metadata = {f"{part}_config": json.dumps(json.loads(text) | changes)}
    with pytest.raises(CheckpointError, match=line) as caught:
        store.load_model(rewritten(model_file, tmp_path, metadata=metadata))
    assert "\n" not in str(caught.value)


def test_tokenizer_of_another_transformer(mini, classes, tmp_path):
    other = reference.load("mini_shared").tokenizer
    with pytest.raises(CheckpointError, match="the tokenizer belongs to another transformer: its sides"):
        store.save_model(tmp_path / "x.safetensors", other, mini.transformer, classes, {})
    with pytest.raises(CheckpointError, match="the class table has 3 classes"):
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
