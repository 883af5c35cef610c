"""Released `.pth` files become files of ours, and compute what the original computes."""

import argparse
import os
import pickle
import shutil
import sys
import zipfile
from datetime import datetime
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import reference
from varcli.checkpoints import conversion
from varcli.checkpoints.conversion import Part, convert, tokenizer_config, transformer_config
from varcli.checkpoints.random_init import randomized
from varcli.checkpoints.store import load_model, load_tokenizer, read_metadata
from varcli.classes import imagenet
from varcli.config import GRID_256, GRID_512, TokenizerConfig, TransformerConfig
from varcli.errors import CheckpointError, InputError, RunError, UsageError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mini():
    return reference.load("mini")


@pytest.fixture(scope="module")
def released(mini, tmp_path_factory):
    """The mini model as a pair of files in the released layout."""
    return written(mini, tmp_path_factory.mktemp("released"))


def written(model, folder):
    paths = [folder / "vae.pth", folder / "var.pth"]
    torch.save(model.tokenizer.state_dict(), paths[0])
    torch.save(model.transformer.state_dict(), paths[1])
    return paths


def nested(model, names=("vae_local", "var_wo_ddp")):
    states = {"vae_local": model.tokenizer.state_dict(), "var_wo_ddp": model.transformer.state_dict()}
    return {"args": {"depth": 2}, "epoch": 3, "trainer": {name: states[name] for name in names}}


@torch.no_grad()
def test_converted_model_computes_what_the_original_does(original, tmp_path):
    out = tmp_path / "out.safetensors"
    convert(written(original, tmp_path), out, original.transformer.config.sides)
    loaded, outputs = load_model(out), original.outputs
    assert loaded.tokenizer.config == original.tokenizer.config
    assert loaded.transformer.config == original.transformer.config
    tokens = loaded.tokenizer.encode(outputs["image_u8"] / 127.5 - 1)
    assert all(torch.equal(ours, outputs[f"tokens.{k}"].long()) for k, ours in enumerate(tokens))
    label = outputs["labels"][: len(tokens[0])].long()
    logits = loaded.transformer(label, loaded.tokenizer.quantize.teacher_input(tokens))
    image = loaded.tokenizer.decode(tokens)
    for ours, theirs in ((logits, outputs["logits"]), (image, outputs["reconstruction"])):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_training_checkpoint_in_one_file(mini, tmp_path):
    torch.save(nested(mini), tmp_path / "ckpt.pth")
    convert([tmp_path / "ckpt.pth"], tmp_path / "out.safetensors", mini.transformer.config.sides)
    loaded = load_model(tmp_path / "out.safetensors")
    assert torch.equal(loaded.transformer.head.weight, mini.transformer.head.weight)
    assert loaded.run == {"converted_from": ["ckpt.pth"]}


def test_training_checkpoint_beside_its_tokenizer_or_another(mini, released, tmp_path):
    torch.save(nested(mini), tmp_path / "ckpt.pth")
    convert([released[0], tmp_path / "ckpt.pth"], tmp_path / "out.safetensors", mini.transformer.config.sides)
    state = dict(mini.tokenizer.state_dict())
    state["quant_conv.bias"] = state["quant_conv.bias"] + 1
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds another tokenizer than"):
        convert([tmp_path / "other.pth", tmp_path / "ckpt.pth"], tmp_path / "o", mini.transformer.config.sides)


def test_any_order_and_wrapped_names(mini, released, tmp_path):
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in mini.transformer.state_dict().items()}
    torch.save(wrapped, tmp_path / "var.pth")
    convert([tmp_path / "var.pth", released[0]], tmp_path / "out.safetensors", mini.transformer.config.sides)
    assert torch.equal(load_model(tmp_path / "out.safetensors").transformer.pos_1LC, mini.transformer.pos_1LC)


def test_file_of_an_older_torch(mini, released, tmp_path):
    torch.save(mini.tokenizer.state_dict(), tmp_path / "vae.pth", _use_new_zipfile_serialization=False)
    convert([tmp_path / "vae.pth", released[1]], tmp_path / "out.safetensors", mini.transformer.config.sides)
    assert (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("depth", "sides"), [(16, GRID_256), (20, GRID_256), (36, GRID_512)])
def test_released_configurations_are_inferred(depth, sides):
    expected = TransformerConfig(
        depth=depth, width=64 * depth, sides=sides, codebook_size=4096, codebook_width=32, shared_adaln=depth == 36
    )
    with torch.device("meta"):
        transformer, tokenizer = Transformer(expected).state_dict(), Tokenizer(TokenizerConfig()).state_dict()
    assert transformer_config(Part("var.pth", transformer), sides) == expected
    assert tokenizer_config(Part("vae.pth", tokenizer), sides) == TokenizerConfig(sides=sides)


def test_unusual_configuration_and_sides_of_a_known_grid(tmp_path):
    tokenizer = TokenizerConfig(
        sides=GRID_256,
        codebook_size=8,
        codebook_width=4,
        base_width=32,
        multipliers=(1, 2),
        encoder_blocks=1,
        kernel_count=3,
    )
    transformer = TransformerConfig(
        depth=1, width=64, sides=GRID_256, codebook_size=8, codebook_width=4, shared_adaln=True
    )
    modules = randomized(tokenizer, transformer)
    for module, name in zip(modules, ("vae.pth", "var.pth"), strict=True):
        torch.save(module.state_dict(), tmp_path / name)
    convert([tmp_path / "vae.pth", tmp_path / "var.pth"], tmp_path / "out.safetensors")
    loaded = load_model(tmp_path / "out.safetensors")
    assert loaded.tokenizer.config == tokenizer
    assert loaded.transformer.config == transformer
    assert loaded.classes == imagenet()


@pytest.mark.parametrize(
    ("sides", "error", "line"),
    [
        (None, InputError, "give the sides with --sides"),
        ((1, 2, 3), UsageError, "make 14 tokens, and the transformer has"),
        ((3, 2, 1), ValueError, "sides must begin with 1 and grow"),
    ],
)
def test_sides_that_do_not_fit(released, tmp_path, sides, error, line):
    with pytest.raises(error, match=line):
        convert(released, tmp_path / "out.safetensors", sides)
    assert not (tmp_path / "out.safetensors").exists()


def test_other_sides_of_the_same_length(mini, released, tmp_path):
    state = dict(mini.transformer.state_dict())
    state["lvl_1L"] = state["lvl_1L"].flip(1)
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(UsageError, match="was trained on other sides than"):
        convert([released[0], tmp_path / "var.pth"], tmp_path / "out.safetensors", mini.transformer.config.sides)


def test_tokenizer_with_another_number_of_scales(mini, released, tmp_path):
    state = dict(mini.tokenizer.state_dict())
    state["quantize.ema_vocab_hit_SV"] = state["quantize.ema_vocab_hit_SV"][:2]
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(UsageError, match="has 2 scales"):
        convert([tmp_path / "vae.pth", released[1]], tmp_path / "out.safetensors", mini.transformer.config.sides)


class Malicious:
    """Unpickling this would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_run_from_a_pickle(released, tmp_path, zipped):
    path = tmp_path / "evil.pth"
    state = {"quantize.embedding.weight": torch.zeros(2, 2), "x": Malicious(tmp_path / "made")}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"evil\.pth was refused: it would run .*mkdir when read; where it was made, save"
    ) as caught:
        convert([path, released[1]], tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)
    path.write_bytes(pickle.dumps(Malicious(tmp_path / "made")))
    with pytest.raises(CheckpointError, match="damaged"):
        convert([path, released[1]], tmp_path / "out.safetensors")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 no archive"])
def test_foreign_file(released, tmp_path, content):
    path = tmp_path / "foreign.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"foreign\.pth was refused: damaged, or not plain tensors") as caught:
        convert([path, released[1]], tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)


def test_truncated_and_missing_file(released, tmp_path):
    path = tmp_path / "half.pth"
    path.write_bytes(released[0].read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"half\.pth"):
        convert([path, released[1]], tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match="No such file"):
        convert([tmp_path / "none.pth", released[1]], tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"weight": torch.zeros(1)}, "neither a VAR tokenizer nor a VAR transformer; it holds weight"),
        ({"b": {"c": 1}, "a": 2}, "neither a VAR tokenizer nor a VAR transformer; it holds a, b"),
        ([1, 2], "neither a VAR tokenizer nor a VAR transformer"),
        ({"trainer": 3}, "neither a VAR tokenizer nor a VAR transformer"),
        ({"quantize.embedding.weight": 3}, "quantize.embedding.weight is not a tensor"),
        (
            {"quantize.embedding.weight": torch.zeros(3)},
            "no tensor quantize.embedding.weight, or one of an unknown shape",
        ),
        ({"quantize.embedding.weight": torch.zeros(3, 2)}, "no tensor encoder.conv_in.weight"),
    ],
)
def test_other_contents(mini, released, tmp_path, content, line):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=line):
        convert([tmp_path / "other.pth", released[1]], tmp_path / "out.safetensors", mini.transformer.config.sides)


def test_one_of_the_two_is_missing(mini, released, tmp_path):
    sides = mini.transformer.config.sides
    with pytest.raises(CheckpointError, match=r"there is no transformer in .*vae\.pth: give its file too"):
        convert([released[0], released[0]], tmp_path / "out.safetensors", sides)
    torch.save(nested(mini, ["var_wo_ddp"]), tmp_path / "ckpt.pth")
    with pytest.raises(CheckpointError, match="there is no tokenizer in"):
        convert([tmp_path / "ckpt.pth"], tmp_path / "out.safetensors", sides)


def test_a_tokenizer_alone(mini, released, tmp_path):
    """Training a transformer needs no other model."""
    out, notes = tmp_path / "t.safetensors", []
    convert([released[0]], out, mini.transformer.config.sides, note=notes.append)
    assert read_metadata(out)[0]["kind"] == "tokenizer" and notes == []
    assert torch.equal(load_tokenizer(out).quant_conv.bias, mini.tokenizer.quant_conv.bias)
    with pytest.raises(InputError, match="no published grid has 4 scales: give the sides with --sides"):
        convert([released[0]], out)
    with pytest.raises(UsageError, match=r"the tokenizer of .* has 4 scales"):
        convert([released[0]], out, (1, 2))
    with pytest.raises(UsageError, match="holds a tokenizer alone"):
        convert([released[0]], out, (1, 2, 3, 4), class_names=tmp_path)


def test_a_tokenizer_alone_has_the_published_sides(tmp_path):
    config = TokenizerConfig(sides=GRID_256, codebook_size=8, codebook_width=4, base_width=32, multipliers=(1,))
    other = TransformerConfig(depth=1, width=64, sides=GRID_256, codebook_size=8, codebook_width=4)
    torch.save(randomized(config, other)[0].state_dict(), tmp_path / "vae.pth")
    notes = []
    convert([tmp_path / "vae.pth"], tmp_path / "t.safetensors", note=notes.append)
    assert load_tokenizer(tmp_path / "t.safetensors").config == config
    assert notes == ["the tokenizer has 10 scales, taken to be 1,2,3,4,5,6,8,10,13,16; --sides says otherwise"]


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 100), lambda path: path.touch(), Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_refused(mini, released, tmp_path, monkeypatch, change):
    """It is mapped: a truncated file would end the process with SIGBUS, an overwritten one give another model."""
    paths = [Path(shutil.copy(path, tmp_path)) for path in released]
    os.utime(paths[1], (0, 0))  # files written within a tick of the clock look alike
    find = conversion.states

    def changed(path, *rest):
        found = find(path, *rest)
        if path == paths[1]:
            change(path)
        return found

    monkeypatch.setattr(conversion, "states", changed)
    with pytest.raises(
        CheckpointError, match=r"var\.pth cannot be read: (it was changed while it was read|No such file)"
    ):
        convert(paths, tmp_path / "out.safetensors", mini.transformer.config.sides)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (lambda v, w: {"model": w, "epoch": 3}, None),
        (lambda v, w: {"ema": w, "args": argparse.Namespace(depth=1)}, None),
        (lambda v, w: {"state_dict": {f"module.{name}": tensor for name, tensor in w.items()}}, None),
        (lambda v, w: {"model": spoilt(w), "ema": w}, "the transformer is taken from ema; model has one too"),
        (
            lambda v, w: {"model_ema": w, "model": spoilt(w)},
            "the transformer is taken from model_ema; model has one too",
        ),
        (lambda v, w: {"net": {**at("vae.", v), **at("var.", w)}, "lr": 0.1}, None),
        (lambda v, w: {**at("module.vae.", v), **at("module.var.", w)}, None),
        (lambda v, w: {"trainer": {"vae_local": v, "var_wo_ddp": w}, "args": argparse.Namespace(a=Path("x"))}, None),
        (lambda v, w: {"model": w, "when": datetime(2024, 4, 3), "loss": np.float64(2.5), "seen": set()}, None),
        (lambda v, w: {"model": w, "settings": SimpleNamespace(a=[1, {"b": PurePosixPath("x")}])}, None),
    ],
)
def test_state_dicts_are_found_under_any_key(mini, released, tmp_path, wrap, told):
    v, w = mini.tokenizer.state_dict(), mini.transformer.state_dict()
    torch.save(wrap(v, w), tmp_path / "own.pth")
    notes = []
    paths = [released[0], tmp_path / "own.pth"]
    convert(paths, tmp_path / "out.safetensors", mini.transformer.config.sides, {"made": "here"}, note=notes.append)
    assert torch.equal(load_model(tmp_path / "out.safetensors").transformer.head.weight, mini.transformer.head.weight)
    assert [told in note for note in notes] == [True] * (told is not None)


def spoilt(state):
    return {name: tensor + 1 for name, tensor in state.items()}


def at(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"args": argparse.Namespace(patch_nums=(1, 2, 3, 4))},
        {"args": {"depth": 2, "patch_nums": [1, 2, 3, 4]}},
        {"trainer": {"config": {"patch_nums": (1, 2, 3, 4)}}},
    ],
)
def test_sides_of_the_files_own_configuration(mini, released, tmp_path, settings):
    torch.save({"model": mini.transformer.state_dict()} | settings, tmp_path / "own.pth")
    convert([released[0], tmp_path / "own.pth"], tmp_path / "out.safetensors")
    assert load_model(tmp_path / "out.safetensors").transformer.config.sides == (1, 2, 3, 4)


def test_class_names_of_a_file_or_the_data(mini, released, tmp_path):
    sides, count = mini.transformer.config.sides, mini.transformer.config.class_count
    names = [f"kind_{i}" for i in reversed(range(count))]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    wnids = [entry.wnid for entry in imagenet().entries[::2][:count]]
    for folder in wnids:
        (tmp_path / "data" / folder).mkdir(parents=True)
    out, notes = tmp_path / "out.safetensors", []
    convert(released, out, sides, class_names=tmp_path / "names.txt", note=notes.append)
    assert [entry.name for entry in load_model(out).classes.entries] == [name.replace("_", " ") for name in names]
    convert(released, out, sides, class_names=tmp_path / "data", note=notes.append)
    assert [entry.wnid for entry in load_model(out).classes.entries] == wnids and notes == []
    convert(released, out, sides, note=notes.append)
    assert notes == [f"{count} classes, numbered; --class-names FILE|FOLDER says what they are"]


@pytest.mark.parametrize(
    ("content", "error", "line"),
    [
        (b"cat\ndog\n", UsageError, "must name 10 classes, one for each row \\(got 2 in"),
        (b"cat\n" * 10, UsageError, "must name each class once \\(cat is there twice"),
        (b"\xff\xfe\xff", InputError, "class names: .* cannot be read"),
        (None, InputError, "class names: .* cannot be read: No such file"),
    ],
)
def test_class_names_that_do_not_fit(mini, released, tmp_path, content, error, line):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(error, match=line):
        convert(released, tmp_path / "o", mini.transformer.config.sides, class_names=tmp_path / "names.txt")
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(os.name == "nt", reason="no devices as on Unix")
def test_class_names_without_end(monkeypatch):
    monkeypatch.setattr(conversion, "MOST_BYTES_OF_NAMES", 1 << 20)
    with pytest.raises(UsageError, match=r"must name 10 classes, one for each row \(got 1 in /dev/zero\)"):
        conversion.named_classes(Path("/dev/zero"), 10)


def test_nobody_is_told_that_foreign_classes_are_imagenets_without_a_word(tmp_path):
    sizes = {"sides": GRID_256, "codebook_size": 8, "codebook_width": 4}
    modules = randomized(
        TokenizerConfig(base_width=32, multipliers=(1,), **sizes), TransformerConfig(depth=1, width=64, **sizes)
    )
    for module, name in zip(modules, ("vae.pth", "mine.pth"), strict=True):
        torch.save(module.state_dict(), tmp_path / name)
    (tmp_path / "var_d16.pth").write_bytes((tmp_path / "mine.pth").read_bytes())
    for name, told in (("mine.pth", 1), ("var_d16.pth", 0)):
        notes = []
        convert([tmp_path / "vae.pth", tmp_path / name], tmp_path / "out.safetensors", note=notes.append)
        assert len(notes) == told and all("1000 classes, taken to be ImageNet's" in note for note in notes)


@pytest.mark.parametrize("name", ["out.pth", "out.PT", "out.ckpt", "var.pth", "link.safetensors", "."])
def test_an_output_that_would_destroy_or_mislead_is_refused(mini, released, tmp_path, name):
    paths = [tmp_path / path.name for path in released]
    for path, source in zip(paths, released, strict=True):
        path.write_bytes(source.read_bytes())
    (tmp_path / "link.safetensors").symlink_to(paths[1])
    before = {path.name: path.read_bytes() for path in paths}
    with pytest.raises((UsageError, RunError)):
        convert(paths, tmp_path / name, mini.transformer.config.sides)
    assert {path.name: path.read_bytes() for path in paths} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.safetensors", "vae.pth", "var.pth"]


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        (
            "head.bias",
            lambda t: t * torch.nan,
            " values in transformer.head.bias that are not finite: train or convert",
        ),
        ("head.bias", lambda t: t.int(), "tensor head.bias of int32: floating-point numbers are needed"),
        ("head.bias", lambda t: t.to(torch.complex64), "tensor head.bias of complex64"),
        ("head.bias", lambda t: t.to_sparse(), "tensor head.bias is sparse, quantized or without values"),
        ("head.bias", lambda t: t.to("meta"), "tensor head.bias is sparse, quantized or without values"),
        ("head.weight", lambda t: t[:1, :1].expand(10**9, 64), "tensor head.weight has fewer values than"),
        ("class_emb.weight", lambda t: t[:0], "no tensor class_emb.weight, or one of an unknown shape"),
        ("blocks.9999.ffn.fc1.weight", lambda t: torch.zeros(1), "no tensor blocks.10.ada_lin.1.bias"),
    ],
)
def test_tensors_that_no_model_can_have(mini, released, tmp_path, name, change, line):
    state = dict(mini.transformer.state_dict())
    state[name] = change(state.get(name))
    if "9999" in name:
        state |= {name.replace("9999", str(i)): torch.zeros(1) for i in range(10, 300)}
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match=line):
        convert([released[0], tmp_path / "var.pth"], tmp_path / "o.safetensors", mini.transformer.config.sides)
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("quantize.ema_vocab_hit_SV", torch.tensor(1.0)), ("encoder.conv_in.weight", torch.zeros(0, 3, 3, 3))],
)
def test_tokenizer_tensors_of_no_use(mini, released, tmp_path, name, tensor):
    torch.save(dict(mini.tokenizer.state_dict()) | {name: tensor}, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match=f"no tensor {name}, or one of an unknown shape"):
        convert([tmp_path / "vae.pth", released[1]], tmp_path / "o", mini.transformer.config.sides)


def test_a_bomb_and_an_endless_file_are_not_read(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w") as content,
    ):
        for _ in range(101):
            content.write(bytes(1_000_000))
    with pytest.raises(CheckpointError, match="its table of contents has 101000000 bytes"):
        convert([tmp_path / "bomb.pth"], tmp_path / "o")
    with pytest.raises(CheckpointError, match="/dev/zero cannot be read: it is not a file"):
        convert([Path("/dev/zero")], tmp_path / "o")


@pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
def test_a_name_that_torch_cannot_open(released, tmp_path):
    path = Path(shutil.copy(released[0], tmp_path / "vae\udce9.pth"))
    with pytest.raises(CheckpointError, match="must have a name in UTF-8"):
        convert([path], tmp_path / "out.safetensors")


def test_foreign_tensor_in_a_released_file(mini, released, tmp_path):
    state = dict(mini.transformer.state_dict()) | {"loss_head.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match=r"unexpected tensor loss_head\.weight"):
        convert([released[0], tmp_path / "var.pth"], tmp_path / "out.safetensors", mini.transformer.config.sides)
