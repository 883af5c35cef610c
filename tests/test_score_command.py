"""`var score` and `var classify`, and `model.score` and `model.classify` behind them."""

import json
import math
import sys
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import varcli
from support import small
from varcli import cli
from varcli.config import sequence_length
from varcli.images.blending import tinted


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture(scope="module")
def model(path):
    return varcli.load(path, device="cpu", dtype="fp32")


@pytest.fixture
def var(path, model, monkeypatch, tmp_path, capsys):
    """Run `var` with the small model in a folder with samples of three classes; return what it printed."""
    monkeypatch.setenv("VAR_CHECKPOINT", str(path))
    monkeypatch.chdir(tmp_path)
    for label in (1, 207, 963):
        model.sample(label)[0].save(f"{label}.png")

    def run(*words, code=0):
        assert cli.run([*map(str, words), "--device", "cpu", "--dtype", "fp32"]) == code
        return capsys.readouterr()

    return run


def lines(printed):
    return [json.loads(line) for line in printed.out.splitlines()]


def test_score_prints_what_the_door_returns(var, model):
    [one, other] = lines(var("score", "207.png", "1.png", "-c", "golden retriever", "--json"))
    assert (one["image"], other["image"]) == ("207.png", "1.png")
    assert one["class"] == {"id": 207, "name": "golden retriever"}
    found = model.score("207.png", 207)
    assert one["nats"] == pytest.approx(found.nats)
    assert sum(scale["nats"] for scale in one["scales"]) == pytest.approx(one["nats"])
    assert [scale["side"] for scale in one["scales"]] == list(small.SIDES)
    bits = one["nats"] / math.log(2)
    assert one["bits_per_token"] == pytest.approx(bits / sequence_length(small.SIDES))
    assert one["bits_per_pixel"] == pytest.approx(bits / 16**2)
    assert found.nats_L.shape == (sequence_length(small.SIDES),)
    assert lines(var("score", "207.png", "-c", "none", "--json"))[0]["class"] is None
    assert var("score", "207.png", "-c", 207).out.startswith(f"207.png\t207 golden retriever\t{found.nats:.1f}\t")


def test_heatmap(var, model):
    var("score", "207.png", "1.png", "-c", 207, "--heatmap", "heat.png", "-q")
    with Image.open("heat.png") as sheet:
        assert sheet.mode == "RGB" and min(sheet.size) > 192
    found = model.score("207.png", 207)
    tokens = found.nats_L[-16:].reshape(4, 4)
    corners = found.nats_map[[0, 0, -1, -1], [0, -1, 0, -1]]
    two = found.nats_L[1:5]
    expected = (tokens[[0, 0, -1, -1], [0, -1, 0, -1]] + two) / 2
    assert corners == pytest.approx(expected, rel=1e-5)


def test_tint_goes_from_blue_to_orange():
    grey = np.full((1, 3, 3), 100, np.uint8)
    (blue, middle, orange) = tinted(grey, np.array([[0, 0.5, 1]], np.float32))[0].astype(int)
    assert blue[2] > blue[0] + 50 and orange[0] > orange[2] + 50
    assert np.ptp(middle) < 30


def test_classify_ranks_as_the_door_does(var, model):
    [one, accuracy] = lines(var("classify", "207.png", "--top", 2, "--candidates", 0, "--json"))
    ranked = model.classify("207.png", candidates=())
    assert [each["id"] for each in one["classes"]] == [each.entry.id for each in ranked[:2]]
    assert one["classes"][0]["nats"] == pytest.approx(model.score("207.png", ranked[0].entry.id).nats, rel=1e-5)
    assert one["label"] == {"id": 207, "name": "golden retriever"}, "from its provenance"
    assert accuracy == {"images": 1, "top_1": float(ranked[0].entry.id == 207), "top_5": 1.0}


def test_classify_of_a_folder(var, model):
    asked = ("classify", ".", "--candidates", "3,2")
    *images, accuracy = lines(var(*asked, "--top", 5, "--json"))
    assert [image["image"].rpartition("/")[2] for image in images] == ["1.png", "207.png", "963.png"]
    hits = [image["classes"][0]["id"] == image["label"]["id"] for image in images]
    assert accuracy == {"images": 3, "top_1": sum(hits) / 3, "top_5": 1.0}
    for image in images:
        expected = model.classify(image["image"].rpartition("/")[2], candidates=(3, 2))
        assert [each["id"] for each in image["classes"]] == [each.entry.id for each in expected]
        assert [each["scales"] for each in image["classes"]] == [3, 3, 3, 2, 2]
    rows = [line.split("\t") for line in var("classify", "1.png", "--candidates", "3,2").out.splitlines()[:5]]
    assert [(row[4] == "-", row[5]) for row in rows] == [(False, "3")] * 3 + [(True, "2")] * 2
    told = var(*asked, "--top", 0).out
    assert told == f"3 images with a label: top-1 {sum(hits) / 3:.1%}, top-5 100.0%\n"
    assert len(var(*asked, "--top", 2, "-n", 2).out.splitlines()) == 2 * 2 + 1
    assert "top-5" not in var(*asked, "--top", 1).out


def test_images_without_a_label_have_no_accuracy(var):
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 40, 3)).astype(np.uint8)).save("photo.jpg")
    [one] = lines(var("classify", "photo.jpg", "--top", 1, "--encodings", 2, "--json"))
    assert one["label"] is None and len(one["classes"]) == 1
    assert len(var("classify", "photo.jpg").out.splitlines()) == 5


def test_an_image_on_standard_input(var, monkeypatch, tmp_path):
    expected = var("classify", "207.png", "--top", 1).out.splitlines()[0].split("\t")
    content = BytesIO((tmp_path / "207.png").read_bytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=content, isatty=lambda: False))
    assert var("classify", "-", "--top", 1).out.rstrip().split("\t") == ["-", "-", *expected[2:]]


def test_a_damaged_image_among_others(var, tmp_path):
    (tmp_path / "damaged.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    printed = var("score", "1.png", "damaged.png", "207.png", "-c", 1, code=3)
    assert "damaged.png" in printed.err and len(printed.out.splitlines()) == 2
    assert "1 of 4 images cannot be read" in var("classify", ".", code=3).err
    printed = var("classify", ".", "--skip-bad", "--top", 1)
    assert "damaged.png" in printed.err and "3 images with a label" in printed.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["score", "1.png"], 2, "--class is required, as in --class 207"),
        (["score", "1.png", "-c", "all"], 2, "--class takes exactly one class here, or none (got all)"),
        (["score", "1.png", "-c", "random"], 2, "--class takes exactly one class here, or none (got random)"),
        (["score", "1.png", "-c", "2"], 3, "this checkpoint does not know 2 "),
        (["score", "nothing.png", "-c", "1"], 3, "the image nothing.png cannot be read"),
        (["score", "1.png", "-c", "1", "--heatmap", "x.jpg"], 2, "--heatmap must be a name ending in .png (got x.jpg)"),
        (["classify"], 2, "exactly one of image paths and --reference must say what to classify"),
        (["classify", "1.png", "-r", "tiny64"], 2, "exactly one of image paths and --reference"),
        (["classify", "1.png", "-"], 2, "- is one image on standard input: neither others nor --num-images"),
        (["classify", "-", "-n", "2"], 2, "- is one image on standard input: neither others nor --num-images can"),
        (["classify", "nothing"], 3, "nothing"),
        (["classify", "-r", "nothing"], 3, "there is no reference nothing: neither a file nor one of the names"),
        (["classify", "1.png", "--candidates", "3,10"], 2, "--candidates must be falling numbers such as 10,3, or 0"),
        (["classify", "1.png", "--candidates", "few"], 2, "--candidates must be whole numbers separated by commas"),
        (["classify", "1.png", "--encodings", "0"], 2, "--encodings must be at least 1 (got 0)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(var, words, code, message):
    printed = var(*words, code=code)
    assert printed.err.count("\n") == 1 and message in printed.err and printed.out == ""
