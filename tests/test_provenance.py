"""PNGs that say where they come from, and files that are there whole or not at all."""

import errno
import json
import os
import shlex
import stat
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from support.provenances import MADE, image, listing, made
from varcli.errors import InputError, RunError
from varcli.files import check_writable, write_atomically
from varcli.images import provenance
from varcli.images.provenance import png_bytes, provenance_from_json, read_provenance, reproduction_command

FULL = OSError(errno.ENOSPC, "No space left on device")
posix = pytest.mark.skipif(os.name == "nt", reason="no devices or permissions as on Unix")


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png_bytes(image(), MADE))
    return path


# --- provenance ------------------------------------------------------------------------------------


def test_png_holds_pixels_and_provenance(png):
    with Image.open(png) as opened:
        assert np.array_equal(np.asarray(opened), image())
        assert opened.text["Title"] == "golden retriever, seed 0"
        assert opened.text["Software"] == "varcli 0.1.0"
        assert set(opened.text) == {"Title", "Software", "varcli"}
    assert read_provenance(png) == MADE


@pytest.mark.parametrize("name", ["golden retriever", "Katze äöü", "猫", 'a "quoted", name\n'])
def test_any_class_name_survives(tmp_path, name):
    path = tmp_path / "x.png"
    path.write_bytes(png_bytes(image(), made(class_name=name)))
    assert read_provenance(path).class_name == name


def test_every_fact_is_read_back(tmp_path):
    other = made(7, class_id=None, class_name="none", cfg=0.1, top_k=0, top_p=0.0, smooth=True, dtype="bfloat16")
    path = tmp_path / "x.png"
    path.write_bytes(png_bytes(image(), other))
    assert read_provenance(path) == other


def test_equal_images_make_equal_files():
    assert png_bytes(image(), MADE) == png_bytes(image(), MADE)


def test_image_without_provenance_is_plain():
    with Image.open(BytesIO(png_bytes(image()))) as opened:
        assert opened.text == {}


def test_settings_are_what_decides_an_image():
    same = {"checkpoint": "elsewhere.safetensors", "class_name": "Hund", "device": "cuda", "version": "9"}
    assert made(**same).identity() == MADE.identity()
    others = {
        "checkpoint_sha256": "00",
        "class_id": None,
        "seed": 1,
        "cfg": 4.0,
        "top_k": 0,
        "top_p": 0.5,
        "smooth": True,
        "temperature": 0.8,
        "ssg": 0.5,
        "vpg": 0.5,
        "cfg_scales": "2-4",
        "approximate": "guidance",
        "dtype": "bf16",
    }
    refined = {"refiner": "var-d16", "refine_from": 7, "refiner_sha256": "11"}
    assert same.keys() | others.keys() | refined.keys() == MADE.to_dict().keys()
    for name, value in others.items():
        assert made(**{name: value}).identity() != MADE.identity()
    first = made(**refined).identity()
    assert first == made(**refined | {"refiner": "copy.safetensors"}).identity() != MADE.identity()
    assert first != made(**refined | {"refiner_sha256": "22"}).identity()
    assert first != made(**refined | {"refine_from": 8}).identity()


def with_text(text):
    info, content = PngInfo(), BytesIO()
    if text is not None:
        info.add_text("varcli", text)
    Image.new("RGB", (4, 4)).save(content, "PNG", pnginfo=info)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "is empty: an image is expected"),
        (b"text", "give a PNG that var sample wrote"),
        (with_text(None), "has no provenance"),
        (with_text("{"), "damaged"),
        (with_text("[1]"), "damaged"),
        (with_text('{"seed": 1}'), "another version"),
        (png_bytes(image(), MADE)[:-40], "cannot be read"),
    ],
    ids=["absent", "empty", "text", "foreign", "no json", "no object", "other fields", "cut off"],
)
def test_image_that_says_nothing(tmp_path, content, words):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.png") as caught:
        read_provenance(path)
    assert words in str(caught.value)


def test_folder_is_no_image(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_provenance(tmp_path)


def test_command_makes_the_image_again():
    assert reproduction_command(MADE) == (
        "var sample --class 207 --seed 0 --checkpoint tiny64 --cfg 1.5 --top-k 900 --top-p 0.96 "
        "--device cpu --dtype fp32"
    )
    other = made(5, class_id=None, smooth=True, checkpoint="my models/a'b.safetensors")
    words = shlex.split(reproduction_command(other))
    assert words[words.index("--class") + 1] == "none"
    assert words[words.index("--checkpoint") + 1] == "my models/a'b.safetensors"
    assert "--smooth" in words


def test_command_is_quoted_as_windows_does(monkeypatch):
    monkeypatch.setattr(provenance, "os", SimpleNamespace(name="nt"))
    assert r'--checkpoint "C:\my models\a.safetensors"' in reproduction_command(
        made(checkpoint=r"C:\my models\a.safetensors")
    )


# --- files -----------------------------------------------------------------------------------------


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "x.png"
    for content in (b"old", b"new"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert listing(tmp_path) == ["x.png"]


@posix
def test_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    write_atomically(tmp_path / "x.png", b"")
    assert stat.S_IMODE((tmp_path / "x.png").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failing, error):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    true_write = Path.write_bytes

    def fail(approximate, content=None):
        if failing == "write_bytes":
            true_write(approximate, b"ha")
        raise error

    with monkeypatch.context() as patch, pytest.raises((RunError, KeyboardInterrupt)) as caught:
        patch.setattr(Path, failing, fail)
        write_atomically(path, b"new")
    if error is FULL:
        assert str(caught.value) == f"{path} cannot be written: No space left on device"
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["x.png"]


def test_longest_file_name_can_be_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match=r"there is no folder .*absent"):
        check_writable(tmp_path / "absent" / "x.png")


@pytest.mark.parametrize("name", ["", "x" * 400 + ".png"], ids=["folder", "too long"])
def test_what_cannot_be_a_file(tmp_path, name):
    with pytest.raises(RunError, match="cannot be written"):
        check_writable(tmp_path / name)


def test_check_touches_nothing(tmp_path):
    (tmp_path / "x.png").write_bytes(b"old")
    check_writable(tmp_path / "x.png")
    check_writable(tmp_path / "y.png")
    assert listing(tmp_path) == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == b"old"


@posix
def test_device_stays_a_device():
    check_writable(Path(os.devnull))
    write_atomically(Path(os.devnull), b"gone")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        check_writable(tmp_path / "x.png")


def test_what_older_files_do_not_mention():
    text = json.loads(MADE.to_json())
    del text["approximate"], text["refiner_sha256"]
    assert provenance_from_json(json.dumps(text), "old.png") == MADE


def test_approximations_and_int8_are_in_the_command():
    words = reproduction_command(made(approximate="guidance,cache", dtype="int8"))
    assert "--quantize int8" in words
    assert "--approximate guidance,cache" in words
