"""`var show`: an image says how it was made."""

import json
from dataclasses import replace

import numpy as np
import pytest

from varcli import cli
from varcli.config import SampleConfig
from varcli.images.provenance import Provenance, png_bytes, provenance_from_json, reproduction_command

MADE = Provenance(
    checkpoint="tiny64",
    checkpoint_sha256="0f" * 32,
    class_id=207,
    class_name="golden retriever",
    seed=3,
    settings=SampleConfig(cfg=4.0, top_k=900, top_p=0.95, smooth=True),
    device="cpu",
    dtype="fp32",
    version="0.1.0",
)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png_bytes(np.zeros((4, 4, 3), np.uint8), MADE))
    return str(path)


def test_says_how_it_was_made(image, capsys):
    assert cli.run(["show", image]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        f"checkpoint tiny64, sha256 {'0f' * 32}",
        "class      207 golden retriever",
        "seed       3",
        "settings   cfg 4, top-k 900, top-p 0.95, smooth",
        "computed   on cpu in fp32, by varcli 0.1.0",
        f"command    {reproduction_command(MADE)}",
    ]


@pytest.mark.parametrize(
    ("device", "dtype", "exact"), [("cuda", "bf16", False), ("cuda", "fp32", True), ("cpu", "bf16", True)]
)
def test_an_image_of_16_bits_on_a_gpu_may_not_come_out_the_same(tmp_path, capsys, device, dtype, exact):
    made = replace(MADE, device=device, dtype=dtype)
    (tmp_path / "x.png").write_bytes(png_bytes(np.zeros((4, 4, 3), np.uint8), made))
    assert cli.run(["show", str(tmp_path / "x.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["computed" if exact else "exact", "command"]


def test_json(image, capsys):
    assert cli.run(["show", image, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("command") == reproduction_command(MADE)
    assert provenance_from_json(json.dumps(shown), "it") == MADE


def test_images_that_say_nothing(tmp_path, capsys):
    plain, text = tmp_path / "plain.png", tmp_path / "text.png"
    plain.write_bytes(png_bytes(np.zeros((4, 4, 3), np.uint8), None))
    text.write_text("not an image")
    for path in (plain, text, tmp_path / "missing.png", tmp_path):
        assert cli.run(["show", str(path)]) == 3
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("var: error: ") and str(path) in err and err.count("\n") == 1
