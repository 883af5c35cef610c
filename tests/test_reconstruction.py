"""`var reconstruct` and `var tokens`: there and back, what it costs, and files that scripts can work on."""

import io
import json
import math
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support import small
from support.fork_server import python
from varcli import cli
from varcli.checkpoints.store import load_tokenizer, save_tokenizer
from varcli.commands import tokens
from varcli.config import TokenizerConfig
from varcli.images.provenance import read_provenance
from varcli.pipelines import tokens as pipeline
from varcli.sampling.reconstruction import bits_per_pixel, encode, growth, psnr, rebuilt

NOISE = np.random.RandomState(0).randint(0, 256, (20, 30, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture
def var(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("VAR_CHECKPOINT", str(model))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(NOISE).save("a.png")
    Image.fromarray(NOISE[:16, :16]).save("b.png")

    def run(*arguments, code=0):
        assert cli.run([*map(str, arguments), "--device", "cpu"]) == code
        return capsys.readouterr()

    return run


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_reconstruction_is_the_tokenizers(original):
    image = original.outputs["image_u8"][0].permute(1, 2, 0).numpy()
    tokens = encode(original.tokenizer, image[None])
    for scale, idx_1l in enumerate(tokens):
        assert torch.equal(idx_1l, original.outputs[f"tokens.{scale}"][:1].long())
    expected = (original.outputs["reconstruction"][0].permute(1, 2, 0) + 1) * 127.5
    assert np.abs(rebuilt(original.tokenizer, tokens) - expected.numpy()).max() < 0.51
    frames = list(growth(original.tokenizer, tokens))
    assert len(frames) == len(tokens) and np.array_equal(frames[-1], rebuilt(original.tokenizer, tokens))
    assert np.array_equal(frames[1], rebuilt(original.tokenizer, tokens[:2]))


def test_figures():
    grey = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(grey, grey) == math.inf
    assert psnr(grey, grey + 1) == pytest.approx(20 * math.log10(255))
    assert bits_per_pixel(TokenizerConfig()) == pytest.approx(680 * 12 / 256**2)


def test_reconstruct_tells_figures_and_shows_images(var, model):
    assert [line.split("\t")[0] for line in var("reconstruct", "a.png", "b.png").out.splitlines()] == ["a.png", "b.png"]
    said = [json.loads(line) for line in var("reconstruct", "a.png", "b.png", "--json", "-o", "out").out.splitlines()]
    assert [row["path"].replace("\\", "/") for row in said] == ["out/a-reconstruct-0.png", "out/b-reconstruct-1.png"]
    tokenizer = load_tokenizer(model)
    assert said[1]["psnr"] == pytest.approx(psnr(NOISE[:16, :16], pixels(said[1]["path"])))
    assert said[0]["bits_per_pixel"] == pytest.approx((1 + 4 + 16) * 6 / 16**2)
    assert np.array_equal(pixels(said[1]["path"]), rebuilt(tokenizer, encode(tokenizer, NOISE[None, :16, :16])))
    made = read_provenance(said[1]["path"])
    assert made.command[:2] == ("reconstruct", "b.png") and len(made.inputs) == 1
    told = var("reconstruct", "a.png", "--growth", "grows.gif", "--grid", "grid.png", "-o", "again.png").err
    assert [line.split()[-1] for line in told.splitlines()] == ["again.png", "grid.png", "grows.gif"]
    with Image.open("grows.gif") as growing:
        assert growing.n_frames == len(small.SIDES)
    assert pixels("grid.png").shape[1] > 2 * 192


def test_a_tokenizer_alone_is_enough(var, model):
    save_tokenizer("alone.safetensors", load_tokenizer(model), {})
    assert var("reconstruct", "b.png", "-m", "alone.safetensors").out == var("reconstruct", "b.png").out


def test_tokens_there_and_back(var, model):
    assert var("tokens", "encode", "a.png", "b.png", "-o", "t.safetensors").out == "t.safetensors\n"
    tensors = load_file("t.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"tokens.{k}": (2, side, side) for k, side in enumerate(small.SIDES)
    }
    with safe_open("t.safetensors", "pt") as file:
        assert json.loads(file.metadata()["names"]) == ["a", "b"] and file.metadata()["sides"] == "1,2,4"
    paths = var("tokens", "decode", "t.safetensors", "-o", "out").out.split()
    var("reconstruct", "b.png", "-o", "b-again.png")
    assert np.array_equal(pixels(paths[1]), pixels("b-again.png"))
    save_file({k: v[1:].flatten(1).long() for k, v in tensors.items() if k != "tokens.2"}, "coarse.safetensors")
    var("tokens", "decode", "coarse.safetensors", "-o", "coarse.png")
    tokenizer = load_tokenizer(model)
    assert np.array_equal(pixels("coarse.png"), rebuilt(tokenizer, encode(tokenizer, NOISE[None, :16, :16])[:2]))


@pytest.mark.parametrize("names", [None, "[" * 100_000, "5", '["a", 1]', '["a", "b", "c"]'])
def test_images_without_names_have_numbers(var, names):
    save_file(GOOD, "t.safetensors", names and {"names": names})
    assert var("tokens", "decode", "t.safetensors", "-o", "out").out == f"{Path('out', '0-tokens-0.png')}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
def test_a_name_that_is_no_text(var):
    Path("a.png").rename("a\udce9.png")
    var("tokens", "encode", "a\udce9.png", "-o", "t.safetensors")
    assert var("tokens", "decode", "t.safetensors", "-o", "out").out == f"{Path('out', 'a-tokens-0.png')}\n"


def test_one_bad_image_does_not_spoil_the_others(var, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"bad")
    given = ("a.png", "bad.png", "b.png")
    said = var("reconstruct", *given, "-o", "out", code=3)
    assert [line.split("\t")[0] for line in said.out.splitlines()] == ["a.png", "b.png"]
    assert "bad.png is not an image" in said.err and "1 of 3 images cannot be used; the others are done" in said.err
    assert sorted(path.name for path in Path("out").iterdir()) == ["a-reconstruct-0.png", "b-reconstruct-2.png"]
    said = var("tokens", "encode", *given, "-o", "t.safetensors", code=3)
    assert said.out == "t.safetensors\n" and "1 of 3 images" in said.err
    var("tokens", "decode", "t.safetensors", "-o", "decoded")
    assert sorted(path.name for path in Path("decoded").iterdir()) == ["a-tokens-0.png", "b-tokens-1.png"]
    said = var("tokens", "encode", "bad.png", "none.png", "-o", "none.safetensors", code=3)
    assert said.out == "" and not Path("none.safetensors").exists()


def test_images_are_read_one_after_the_other(var, monkeypatch):
    held = []
    read = pipeline.read_source_image

    def counted(name):
        source = read(name)
        held.append(weakref.ref(source.levels))
        assert sum(each() is not None for each in held) <= 2
        return source

    monkeypatch.setattr(pipeline, "read_source_image", counted)
    Image.fromarray(NOISE).save("c.png")
    Image.fromarray(NOISE).save("d.png")
    var("reconstruct", "a.png", "b.png", "c.png", "d.png")
    var("tokens", "encode", "a.png", "b.png", "c.png", "d.png", "-o", "t.safetensors")
    assert len(held) == 8


def test_very_long_images_take_little_memory(var):
    Image.new("L", (1, 1_000_000), 99).save("thin.png")
    assert var("reconstruct", "thin.png").out.startswith("thin.png\t")


def test_equal_runs_write_equal_files(var, tmp_path):
    for name in ("one", "two"):
        var("tokens", "encode", "a.png", "-o", f"{name}.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.slow
def test_pipes(model, tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for command in ("tokens encode - -o -", "tokens decode - -o -", "reconstruct - -o -"):
        words = [python(), "-m", "varcli", *command.split(), "-m", str(model), "--device", "cpu"]
        done = subprocess.run(words, input=content, capture_output=True, check=True, cwd=tmp_path)
        content = done.stdout
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (16, 16)
    assert b"dB" in done.stderr


def test_a_pipe_without_end(var, monkeypatch):
    monkeypatch.setattr(tokens, "MOST_BYTES", 0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"more")))
    assert "standard input has more than 0 GiB" in var("tokens", "decode", "-", code=3).err


GOOD = {f"tokens.{k}": torch.zeros(1, side, side, dtype=torch.int32) for k, side in enumerate(small.SIDES)}


@pytest.mark.parametrize(
    ("change", "metadata", "code", "message"),
    [
        ({"tokens.0": torch.zeros(1, 1, 1)}, {}, 3, "must be whole numbers (got torch.float32 at scale 1)"),
        (
            {"tokens.1": torch.zeros(1, 3, 3, dtype=torch.int32)},
            {},
            3,
            "must be images × 2 × 2 at scale 2 (got 1 × 3 × 3)",
        ),
        ({"tokens.1": torch.full((1, 2, 2), 64)}, {}, 3, "must be rows of the codebook, 0 to 63 (scale 2 has others)"),
        ({"tokens.1": torch.full((1, 2, 2), -1)}, {}, 3, "must be rows of the codebook"),
        (
            {"tokens.1": torch.zeros(2, 2, 2, dtype=torch.int32)},
            {},
            3,
            "must have the same number of images at every scale, at least one",
        ),
        (
            {"tokens.3": torch.zeros(1, 8, 8, dtype=torch.int32)},
            {},
            3,
            "one map for each of the first scales, 1 to 3 (got 4)",
        ),
        ({"tokens.5": torch.zeros(1, 8, 8, dtype=torch.int32)}, {}, 3, "of the first scales on"),
        ({"weight": torch.zeros(1)}, {}, 3, "must hold tokens.0, tokens.1 … of the first scales on (got weight)"),
        ({}, {"tokenizer_sha256": "00"}, 4, "another tokenizer's"),
    ],
)
def test_token_files_that_cannot_be_used(var, tmp_path, change, metadata, code, message):
    save_file(GOOD | change, "bad.safetensors", metadata)
    before = sorted(tmp_path.iterdir())
    said = var("tokens", "decode", "bad.safetensors", "-o", "out.png", code=code)
    assert said.out == "" and message in said.err and said.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tokens", "decode", "none.safetensors"], 3, "the token file none.safetensors cannot be read: "),
        (
            ["tokens", "decode", "a.png"],
            3,
            "error: the token file a.png cannot be read: it is no safe",
        ),
        (["tokens", "encode", "none.png", "-o", "t.safetensors"], 3, "image none.png cannot be read"),
        (["tokens", "encode", "a.png", "-o", "no/t.safetensors"], 5, "no/t.safetensors cannot be written"),
        (["reconstruct", "none.png"], 3, "image none.png cannot be read"),
        (["reconstruct", "a.png", "b.png", "--growth", "x.gif"], 2, "--growth shows exactly one image (got 2 images)"),
        (["reconstruct", "a.png", "-o", "-", "--json"], 2, "--json cannot be used with --out -"),
        *(
            (["reconstruct", "a.png", "-o", f"x.{ending}"], 2, "must be a folder, a name ending in .png, or -")
            for ending in ("npz", "avif", "jpg")
        ),
        (["reconstruct", "a.png", "--grid", "a.png"], 2, "--grid a.png is what is read, and would be"),
        (["reconstruct", "a.png", "--out", "a.png"], 2, "--out a.png is what is read, and would be"),
        (["tokens", "decode", "a.png", "--out", "a.png"], 2, "--out a.png is what is read, and would be"),
        (["tokens", "encode", "a.png", "-o", "a.png"], 2, "--out must be a name ending in .safetensors"),
        (["tokens", "encode", "a.png", "-o", "tokens"], 2, "--out must be a name ending in .safetensors"),
        (
            ["tokens", "encode", "a.png", "-o", "t.safetensors", "--crops", "2"],
            2,
            "are for data to train on, not images",
        ),
        (["tokens", "encode", ".", "-o", "t.safetensors"], 2, "--out must be a folder, for token maps of data"),
        (["tokens", "encode", ".", "a.png", "-o", "cache"], 3, "a.png is not a folder, .zip, .tar or .npz of images"),
        (["tokens", "decode", "t.safetensors", "-o", "x.npz"], 2, "must be a folder, a name ending in .png, or -"),
    ],
)
def test_mistakes(var, tmp_path, arguments, code, message):
    before = sorted(tmp_path.iterdir())
    said = var(*arguments, code=code)
    assert said.out == "" and message in said.err and said.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_image_with_the_name_of_a_token_file_is_not_replaced(var):
    Path("a.png").rename("a.safetensors")
    said = var("tokens", "encode", "a.safetensors", "-o", "./a.safetensors", code=2)
    assert "--out a.safetensors is what is read, and would be replaced: give another name" in said.err
    with Image.open("a.safetensors") as image:
        assert image.size == (30, 20)
