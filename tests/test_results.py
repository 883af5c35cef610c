"""A result as JSON both ways and as lines: nothing that decides a figure is missing from either."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.evaluations import evaluation, tokenizer
from varcli.config import SampleConfig
from varcli.errors import InputError
from varcli.evaluation.results import (
    FIGURES,
    SETTINGS,
    THUMBNAILS,
    ClassSpread,
    Gallery,
    Origin,
    Published,
    ReferenceOrigin,
    Result,
)

SAMPLES = Result(
    version="0.1.0",
    date="2026-11-23T12:00:00Z",
    what="samples",
    checkpoint={
        "name": "var-d16",
        "sha256": "5e" * 32,
        "cfg": 1.5,
        "top_k": 900,
        "top_p": 0.96,
        "smooth": False,
        "approximate": "",
        "device": "cpu",
        "dtype": "fp32",
        "seed": 7,
    },
    source=None,
    n=2000,
    classes=1000,
    reference=ReferenceOrigin(name="imagenet-256", sha256="ab" * 32, n=50_000, pixels=256),
    extractor=Origin(name="inception-v3-compat", sha256="cd" * 32),
    protocol={"is_splits": 10, "resize": None},
    metrics={"fid": 9.5, "fid_infinity": 3.25, "fid_bias": 6.25, "inception_score": 250.0, "inception_score_std": 3.0},
    published=Published(fid=3.3, inception_score=274.4, band=(3.3, 3.6), inside=False),
    per_class=[ClassSpread(id=0, name="tench", n=2, spread=11.5)],
    warnings=["only 2000 images"],
    seconds={"total": 1.0},
)


# --- JSON -------------------------------------------------------------------------------------------


def test_json_holds_everything():
    facts = json.loads(json.dumps(SAMPLES.facts()))
    assert facts["kind"] == "varcli-eval"
    assert facts["format"] == 1
    assert facts.keys() == {"kind", "format"} | {field.name for field in dataclasses.fields(Result)}
    assert facts["published"] == {"fid": 3.3, "inception_score": 274.4, "band": [3.3, 3.6], "inside": False}
    assert facts["per_class"] == [{"id": 0, "name": "tench", "n": 2, "spread": 11.5}]
    assert facts["reference"]["n"] == 50_000


@pytest.mark.parametrize("facts", [SAMPLES.facts(), evaluation(), tokenizer()])
def test_reading_returns_what_was_written(facts):
    facts = json.loads(json.dumps(facts))
    assert json.loads(json.dumps(Result.from_json(facts, "x").facts())) == facts
    assert Result.from_json(json.loads(json.dumps(SAMPLES.facts())), "x") == dataclasses.replace(SAMPLES, images=[])


def test_results_of_earlier_versions_are_read_under_todays_names():
    today = evaluation(what="images", seconds={"total": 3.0, "images": 2.0}, settings={"approximate": "cache"})
    earlier = {"pictures" if name == "images" else name: value for name, value in today.items()}
    earlier |= {"what": "pictures", "seconds": {"total": 3.0, "pictures": 2.0}}
    names = {"approximate": "draft"}
    earlier["checkpoint"] = {names.get(name, name): value for name, value in today["checkpoint"].items()}
    assert Result.from_json(earlier, "x") == Result.from_json(today, "x")


def test_results_written_by_an_earlier_version_are_read():
    """The fixture was written by the version that said "picture" and "draft"."""
    lines = (Path(__file__).parent / "fixtures" / "earlier_results.jsonl").read_text().splitlines()
    samples, tokenizer, images = [Result.from_json(json.loads(line), "x") for line in lines]
    assert (samples.what, tokenizer.what, images.what) == ("samples", "tokenizer", "images")
    assert samples.checkpoint["approximate"] == "tokens"
    assert (len(samples.images), len(tokenizer.images)) == (2, 0)
    assert (samples.metrics["fid"], tokenizer.metrics["rfid"]) == (3.45, 21.5)


def test_a_field_that_may_be_null_may_be_missing():
    facts = evaluation()
    needed = ("kind", "format", "version", "date", "what", "n", "extractor", "protocol", "metrics")
    least = Result.from_json({name: facts[name] for name in needed}, "x")
    assert (least.checkpoint, least.reference, least.per_class, least.warnings, least.images) == (None,) * 3 + ((), ())
    for name in needed:
        with pytest.raises(InputError):
            Result.from_json({key: value for key, value in facts.items() if key != name}, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "recipe"}, "the evaluation result x must be what `var eval --out` or `--json` writes"),
        ({"format": 2}, "the evaluation result x must have format 1 (got 2)"),
        ({"n": "many"}, 'the evaluation result x: n must be a whole number of at least 0 (got "many")'),
        ({"n": None}, "the evaluation result x: n is missing"),
        ({"n": -1}, "n must be a whole number of at least 0 (got -1)"),
        ({"n": 1.5}, "n must be a whole number of at least 0 (got 1.5)"),
        ({"n": True}, "n must be a whole number of at least 0 (got true)"),
        ({"extractor": None}, "extractor is missing"),
        ({"extractor": []}, "extractor must be an object (got [])"),
        ({"reference": {"name": "r"}}, "reference.sha256 is missing"),
        ({"checkpoint": {"name": 3, "sha256": "5e"}}, "checkpoint.name must be a string (got 3)"),
        ({"checkpoint": {"name": "r"}}, "checkpoint.sha256 must be a string (got null)"),
        ({"source": {"paths": "here"}}, 'source.paths must be a list (got "here")'),
        ({"metrics": {"fid": "low"}}, 'metrics.fid must be a number or a list (got "low")'),
        ({"metrics": {"fid": float("nan")}}, "metrics.fid must be a number (got NaN)"),
        ({"metrics": {"fid": 10**400}}, "metrics.fid must be a number (got 1000"),
        ({"metrics": {"codebook_usage": [1, "x"]}}, 'metrics.codebook_usage[1] must be a number (got "x")'),
        ({"published": {"fid": 3, "band": [3]}}, "published.band must be a list of 2 (got [3])"),
        ({"published": {"fid": 3, "inside": 1}}, "published.inside must be true or false (got 1)"),
        ({"protocol": {"deep": [[1]]}}, "protocol.deep[0] must be a string or true or false or a number (got [1])"),
        ({"warnings": "none"}, 'warnings must be a list (got "none")'),
        ({"images": ["PHN2Zz4="]}, 'images[0] must be a PNG in base64 (got "PHN2Zz4=")'),
        ({"images": ["é"]}, "images[0] must be a PNG in base64"),
        ({"per_class": [{"id": 0, "name": 3}]}, "per_class[0].name must be a string (got 3)"),
        ({"color": "red"}, "color is not a field that this version of varcli knows"),
        ({"extractor": {"name": "a", "sha256": "b", "url": "c"}}, "extractor.url is not a field"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_errors_name_the_field_that_is_wrong(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Result.from_json(evaluation() | change, "x")


@pytest.mark.parametrize("facts", [None, 3, [], "text", {}])
def test_other_json_is_no_result(facts):
    with pytest.raises(InputError, match="must be what `var eval"):
        Result.from_json(facts, "x")


def test_reading_a_result_needs_no_torch():
    code = "import sys, varcli.evaluation.results; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- lines ------------------------------------------------------------------------------------------


def test_lines_say_figures_and_what_decides_them():
    lines = dict(SAMPLES.lines())
    assert lines["FID"] == "9.50 (FID∞ 3.25, extrapolated to infinitely many images)"
    assert lines["inception score"] == "250.00 ± 3.00"
    assert lines["images"] == "2000, 1000 classes"
    assert lines["checkpoint"] == "var-d16, sha256 5e5e5e5e5e5e"
    assert "cfg 1.5, top-k 900, top-p 0.96" in lines["settings"]
    assert "seed 7" in lines["settings"]
    assert "smooth" not in lines["settings"], "it is off"
    assert lines["reference"] == "imagenet-256, sha256 abababababab, 50000 images"
    assert lines["extractor"] == "inception-v3-compat, sha256 cdcdcdcdcdcd"
    assert lines["protocol"] == "is_splits 10"
    assert lines["published"] == "FID 3.30, IS 274.4; others measured 3.3 to 3.6: this is outside"


@pytest.mark.parametrize(("inside", "words"), [(True, ": this is inside"), (None, "others measured 3.3 to 3.6")])
def test_the_band(inside, words):
    published = dataclasses.replace(SAMPLES.published, inside=inside)
    assert dict(dataclasses.replace(SAMPLES, published=published).lines())["published"].endswith(words)


def test_figures_of_a_tokenizer():
    metrics = {"rfid": 21.5, "psnr": 19.456, "ssim": 0.5, "codebook_usage": [0.06, 0.5, 1.0]}
    lines = dict(dataclasses.replace(SAMPLES, metrics=metrics, checkpoint=None, published=None).lines())
    assert lines["rFID"] == "21.50"
    assert lines["PSNR, dB"] == "19.46"
    assert lines["codebook usage per scale"] == "6 50 100 %"
    assert "settings" not in lines


def test_every_figure_and_every_sampling_option_has_its_place():
    metrics = dict.fromkeys(FIGURES, 0.5)
    assert {figure.title for figure in FIGURES.values()} <= dict(
        dataclasses.replace(SAMPLES, metrics=metrics).lines()
    ).keys()
    assert {option.name for option in dataclasses.fields(SampleConfig)} <= set(SETTINGS)


# --- thumbnails -------------------------------------------------------------------------------------


def test_thumbnails_are_spread_over_all_images_whatever_the_batches():
    images = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 256, 256, 3), np.uint8)
    found = []
    for size in (1, 7, 100):
        gallery = Gallery()
        gallery.open(len(images))
        batches = [(range(i, min(i + size, 100)), images[i : i + size], [-1] * size) for i in range(0, 100, size)]
        assert sum(len(batch[0]) for batch in gallery.watched(batches)) == 100
        found.append(gallery.images())
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == THUMBNAILS
    result = Result.from_json(json.loads(json.dumps(dataclasses.replace(SAMPLES, images=found[0]).facts())), "x")
    assert result.images == found[0]


def test_a_gallery_that_is_not_open_keeps_nothing():
    gallery = Gallery()
    list(gallery.watched([([0], np.zeros((1, 4, 4, 3), np.uint8), [-1])]))
    assert gallery.images() == []
