"""Damaged files of every kind that a user may hand over end in one line and an exit code, never in a traceback.

Each kind gets some seconds. A failure names its seed: the same seed makes the same file.
"""

import json
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from support import small
from varcli import cli
from varcli.checkpoints.store import load_model
from varcli.pipelines.model import Model

SECONDS, MOST = 1.2, 150
"""For each kind of file: how long, and how many files at most."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    model = small.save(folder / "model.safetensors")
    loaded = load_model(model)
    torch.save(loaded.tokenizer.state_dict(), folder / "vae.pth")
    old = {"model": loaded.transformer.state_dict(), "args": {"patch_nums": list(small.SIDES)}}
    torch.save(old, folder / "var.pth", _use_new_zipfile_serialization=False)
    sampler = Model(str(model), model, torch.device("cpu"), "fp32")
    (image,) = sampler.sample([1], count=1)
    image.save(folder / "image.png")
    assert (
        cli.run(["tokens", "encode", str(folder / "image.png"), "-m", str(model), "-o", str(folder / "t.safetensors")])
        == 0
    )
    assert load_file(folder / "t.safetensors")
    (folder / "names.json").write_text(json.dumps({"kind": "varcli-eval", "results": [{"fid": 3.0}]}))
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "mask.png")
    return folder


COMMANDS = {
    "model.safetensors": [
        ["checkpoints", "show", "{bad}"],
        ["classes", "-m", "{bad}"],
        ["checkpoints", "verify", "{bad}"],
    ],
    "vae.pth": [["checkpoints", "convert", "{bad}", "{good}/var.pth", "-o", "{out}.safetensors"]],
    "var.pth": [["checkpoints", "convert", "{good}/vae.pth", "{bad}", "-o", "{out}.safetensors"]],
    "t.safetensors": [["tokens", "decode", "{bad}", "-m", "{good}/model.safetensors", "-o", "{out}"]],
    "image.png": [["show", "{bad}"], ["show", "{bad}", "--json"]],
    "names.json": [["report", "{bad}", "-o", "{out}.html"]],
}


def damaged(content, random):
    """Return a file's bytes with something wrong: cut, changed, doubled, or with words that mean something."""
    content = bytearray(content)
    front = random.choice((64, 1024, len(content)))  # what says how to read the rest stands in front
    for _ in range(random.choice((1, 1, 4, 40))):
        offset = random.randrange(min(front, len(content)) or 1)
        match random.randrange(6):
            case 0:
                content[offset : offset + 1] = bytes([random.randrange(256)])
            case 1:
                del content[offset : offset + random.choice((1, 8, 1000))]
            case 2:
                content[offset:offset] = content[offset : offset + random.choice((1, 8, 1000))]
            case 3:
                del content[random.randrange(len(content) + 1) :]
            case 4:
                content[offset : offset + 8] = random.choice(WORDS)
            case 5:
                content[offset:offset] = random.choice(WORDS)
    return bytes(content)


WORDS = (b"[" * 9999, b"\xff" * 8, bytes(8), b"-1", b"1e999", b"NaN", b"null", b'"\\ud800"', b"9" * 5000, b"{}", b"\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_damaged_file_is_one_line(files, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    good = (files / name).read_bytes()
    begun = time.monotonic()
    for seed in range(MOST):
        if time.monotonic() - begun > SECONDS:
            break
        bad = tmp_path / name
        bad.write_bytes(damaged(good, random.Random(seed)))
        paths = {"bad": bad, "good": files, "out": tmp_path / "out"}
        for command in COMMANDS[name]:
            words = [word.format(**paths) for word in command]
            try:
                code = cli.run(words)
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {' '.join(words)}") from error
            err = capsys.readouterr().err
            errors = [line for line in err.splitlines() if line.startswith("var: error: ")]
            assert code in (0, 2, 3, 4, 5), f"seed {seed}: exit code {code}"
            assert len(errors) == (code != 0), f"seed {seed}: {err}"
            assert all(len(line) < 600 and line.isprintable() for line in err.splitlines()), f"seed {seed}: {err}"
            assert code == 0 or err.splitlines()[-1] == errors[0], f"seed {seed}: {err}"
