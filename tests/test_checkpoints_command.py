"""`var checkpoints`, from the command line's words to lines and exit codes."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from support import reference
from varcli.checkpoints import registry as registering
from varcli.checkpoints import store
from varcli.checkpoints.conversion import class_table
from varcli.checkpoints.random_init import randomized
from varcli.checkpoints.registry import markdown_table, registry
from varcli.checkpoints.safetensors_io import checkpoint_sha256, load_tensors
from varcli.checkpoints.store import load_model, recorded_hashes, save_model, save_tokenizer
from varcli.cli import run
from varcli.config import SampleConfig
from varcli.downloads import record
from varcli.errors import CheckpointError
from varcli.pipelines.model import Model

SIDES = "1,2,3,4"


@pytest.fixture(scope="module")
def mini():
    return reference.load("mini")


@pytest.fixture(scope="module")
def released(mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    torch.save(mini.tokenizer.state_dict(), folder / "vae.pth")
    torch.save(mini.transformer.state_dict(), folder / "var.pth")
    return [str(folder / "vae.pth"), str(folder / "var.pth")]


@pytest.fixture(scope="module")
def model_file(mini, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "mini.safetensors"
    classes = class_table(mini.transformer.config.class_count)
    save_model(path, mini.tokenizer, mini.transformer, classes, {"epochs": 3})
    return path


@pytest.fixture
def var(capsys, tmp_path, monkeypatch):
    """Return what runs `var checkpoints …` in this process, giving exit code, stdout and stderr; caches are empty."""
    monkeypatch.setattr(registering, "cache_folder", lambda: tmp_path / "cache")

    def call(*arguments):
        code = run(["checkpoints", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def changed(model_file, tmp_path, change, rehash=False):
    """Return a copy of a model file whose tensors went through `change`."""
    tensors, metadata = load_tensors(model_file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    if rehash:
        metadata |= recorded_hashes(tensors, metadata)
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    return tmp_path / "changed.safetensors"


def test_list(var):
    code, out, err = var("list")
    lines = [line.split("\t") for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [line[0] for line in lines] == list(registry())
    assert lines[1] == ["var-d16", "256", "1000", "310 M", "3.30", "274.4", "MIT", "–", "no"]


def test_list_json(var, tmp_path):
    code, out, _ = var("list", "--json")
    facts = {line["name"]: line for line in map(json.loads, out.splitlines())}
    d16 = facts["var-d16"]
    assert code == 0
    assert list(facts) == list(registry())
    assert (d16["pixels"], d16["parameters"], d16["fid"], d16["inception_score"]) == (256, 310_283_520, 3.30, 274.4)
    assert (d16["licence"], d16["here"], d16["path"]) == ("MIT", False, str(tmp_path / "cache" / "var-d16.safetensors"))
    assert d16["presets"]["metrics"] == asdict(SampleConfig(cfg=1.5, top_k=900, top_p=0.96))
    assert d16["files"]["vae_ch160v4096z32.pth"]["bytes"] == 436_075_834
    assert "sha256" in d16["files"]["var_d16.pth"]


def test_list_and_show_mean_the_same_by_the_same_name(var, model_file, mini, tmp_path, monkeypatch):
    """The hash of a file's bytes is one thing, the hash of what it holds, which images name, another."""
    classes, written = mini.transformer.config.class_count, checkpoint_sha256(model_file)
    entry = replace(registry()["var-d16"], classes=classes, file_sha256=written)
    for module in (registering, store):
        monkeypatch.setattr(module, "registry", lambda: {"var-d16": replace(entry, depth=None)})
    (tmp_path / "cache").mkdir()
    entry.path.write_bytes(model_file.read_bytes())
    listed, shown = (json.loads(var(*words, "--json")[1]) for words in (["list"], ["show", "var-d16"]))
    assert {name: shown[name] for name in listed} == listed
    assert "sha256" not in listed
    assert (shown["file_sha256"], shown["sha256"]) == (written, load_model(model_file).sha256)
    assert var("verify", "var-d16")[0] == 0


def test_list_as_the_readme_has_it(var):
    assert var("list", "--markdown") == (0, markdown_table(), "")


def test_show_a_name_that_is_not_here(var):
    code, out, _ = var("show", "var-d16")
    assert code == 0
    assert "fid:                  3.3\n" in out
    assert "source:               https://huggingface.co/FoundationVision/var\n" in out
    assert "  var_d16.pth:\n    repository:       FoundationVision/var\n" in out


def test_show_a_file(var, model_file, mini):
    code, out, _ = var("show", model_file, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["kind"] == "model"
    assert facts["tokenizer"]["sides"] == [1, 2, 3, 4]
    assert facts["transformer"]["depth"] == mini.transformer.config.depth
    assert facts["transformer"]["values"] == sum(weight.numel() for weight in mini.transformer.parameters())
    assert facts["classes"] == mini.transformer.config.class_count
    assert facts["run"] == {"epochs": 3}
    assert facts["sha256"] == load_model(model_file).sha256
    code, out, _ = var("show", model_file)
    assert f"sha256:               {facts['sha256']}\n" in out
    assert "  sides:              1, 2, 3, 4\n" in out


def test_show_and_verify_a_tokenizer(var, mini, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    save_tokenizer(path, mini.tokenizer, {})
    code, out, _ = var("show", path, "--json")
    assert (code, json.loads(out)["kind"]) == (0, "tokenizer")
    assert "classes" not in json.loads(out)
    assert var("verify", path)[0] == 0


def test_convert_then_verify(var, mini, released, tmp_path):
    out_file = tmp_path / "mini.safetensors"
    classes = "var: 10 classes, numbered; --class-names FILE|FOLDER says what they are\n"
    assert var("convert", *released, "--out", out_file, "--sides", SIDES) == (0, f"{out_file}\n", classes)
    assert torch.equal(load_model(out_file).transformer.head.weight, mini.transformer.head.weight)
    code, out, _ = var("verify", out_file)
    assert (code, out) == (0, f"{out_file}: ok, sha256 {load_model(out_file).sha256}\n")


@pytest.fixture
def cached(mini, model_file, tmp_path, monkeypatch):
    """The mini model as if it were var-d16 and had been downloaded; the file in the cache."""
    config = mini.transformer.config
    entry = replace(registry()["var-d16"], classes=config.class_count, depth=config.depth)
    monkeypatch.setattr(registering, "registry", lambda: {"var-d16": entry})
    monkeypatch.setattr(store, "registry", lambda: {"var-d16": entry})
    monkeypatch.setattr(store, "cache_folder", lambda: tmp_path / "cache")
    path = tmp_path / "cache" / "var-d16.safetensors"
    path.parent.mkdir()
    path.write_bytes(model_file.read_bytes())
    return path


def test_a_name_that_is_here(var, cached):
    assert var("download", "var-d16") == (0, f"{cached}\n", "")
    assert var("verify", "var-d16")[0] == 0
    facts = json.loads(var("show", "var-d16", "--json")[1])
    assert (facts["fid"], facts["kind"], facts["bytes"]) == (3.30, "model", cached.stat().st_size)


def half(path, mini):
    path.write_bytes(path.read_bytes()[:-5])


def tokenizer_alone(path, mini):
    save_tokenizer(path, mini.tokenizer, {})


def other_depth(path, mini):
    randoms = randomized(mini.tokenizer.config, replace(mini.transformer.config, depth=1))
    save_model(path, *randoms, class_table(mini.transformer.config.class_count), {})


def other_weights(path, mini):
    record(path.parent, path.name, "0" * 64)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (half, "cannot be read: it has"),
        (tokenizer_alone, "holds a tokenizer instead of var-d16"),
        (other_depth, "another model than var-d16: depth 1 and 10 classes"),
        (other_weights, "another model than the one downloaded as var-d16"),
    ],
)
def test_what_is_wrong_under_a_downloaded_name_is_told_with_the_way_out(var, cached, mini, change, line):
    change(cached, mini)
    code, out, err = var("verify", "var-d16")
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert line in err and f"; delete {cached} to download var-d16 again" in err
    with pytest.raises(CheckpointError, match=rf"{line}.*; delete .* to download var-d16 again"):
        Model("var-d16", cached, torch.device("cpu"), "fp32").load_weights()


def test_verify_finds_what_changed(var, model_file, tmp_path):
    def add_one(name):
        def change(tensors):
            tensors[name] += 1

        return change

    def spoil(tensors):
        tensors["transformer.head.bias"][3] = torch.nan

    cases = [
        (add_one("transformer.head.bias"), False, "changed since it was written"),
        (add_one("tokenizer.quant_conv.bias"), False, "has a damaged tokenizer, or another"),
        (spoil, True, "1 values in transformer.head.bias that are not finite"),
    ]
    for change, rehash, line in cases:
        assert_refused(var("verify", changed(model_file, tmp_path, change, rehash)), 4, line)


def assert_refused(answer, code, line):
    """The command said one line on stderr and nothing on stdout."""
    given, out, err = answer
    assert (given, out) == (code, "")
    assert line in err
    assert err.startswith("var: error: ")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        (["show", "var-d17"], 4, "neither a file nor one of the names var-d1"),
        (["show", __file__], 4, "cannot be read"),
        (["verify", "var-d16"], 4, "is not on this machine yet: var checkpoints download var-d16"),
        (["verify", "nothing.safetensors"], 4, "the checkpoint nothing.safetensors does not exist"),
        (["download", "var-d99"], 4, "the names are tiny64, var-d16"),
        (["convert", "a.pth", "b.pth"], 2, "--out is required"),
        (
            ["convert", "a.pth", "b.pth", "--out", "c", "--sides", "1,two"],
            2,
            "whole numbers separated by commas",
        ),
        (["convert", "a.pth", "b.pth", "--out", "c"], 4, "a.pth cannot be read: No such file"),
        (["convert", "{vae}", "{var}", "--out", "{tmp}/c", "--sides", "2,1"], 2, "sides must begin with 1 and grow"),
        (["convert", "{vae}", "{var}", "--out", "{tmp}/c", "--sides", "1,2"], 2, "make 5 tokens"),
        (["convert", "{vae}", "{var}", "--out", "{tmp}/c"], 3, "give the sides with --sides"),
        (["convert", "{vae}", "{vae}", "--out", "{tmp}/c"], 4, "there is no transformer in"),
        (["convert", "{vae}", "{var}", "--out", "{tmp}/no/c", "--sides", SIDES], 5, "cannot be written"),
        (["convert", "{vae}", "{var}", "--out", "{tmp}", "--sides", SIDES], 5, "cannot be written: it is a folder"),
        (
            ["convert", "{vae}", "{var}", "--out", "{tmp}/c.pth"],
            2,
            "--out must be a .safetensors file",
        ),
        (["convert", "{vae}", "--out", "{tmp}/c"], 3, "no published grid has 4 scales"),
        (["verify", "{vae}"], 4, "vae.pth must be converted first: var checkpoints convert"),
        (["show", "{tmp}"], 4, "is a folder; give the file of a model"),
        (["show", "{run}"], 4, "is a folder; its model is {run}/model.safetensors"),
        (["show", "{run}/state.safetensors"], 4, "is the state of a training run; the model is beside it"),
    ],
)
def test_one_line_and_the_right_exit_code(var, released, model_file, tmp_path, tmp_path_factory, case):
    arguments, code, line = case
    run = tmp_path_factory.mktemp("run")
    (run / "model.safetensors").write_bytes(model_file.read_bytes())
    save_file({"a": torch.zeros(1)}, run / "state.safetensors", {"step": "1", "identity": "{}"})
    paths = {"vae": released[0], "var": released[1], "tmp": tmp_path, "run": run}
    assert_refused(var(*(argument.format(**paths) for argument in arguments)), code, line.format(**paths))
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_do_shows_the_help(var):
    code, out, err = var()
    assert code in (0, 2)
    assert "convert" in out + err
