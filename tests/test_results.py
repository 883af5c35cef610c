"""A result as JSON and as lines: nothing that decides a figure is missing from either."""

import dataclasses
import json

import pytest

from varcli.evaluation.results import ClassSpread, Origin, Published, ReferenceOrigin, Result

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


def test_json_holds_everything_and_reads_back():
    facts = json.loads(json.dumps(SAMPLES.facts()))
    assert facts["kind"] == "varcli-eval"
    assert facts["format"] == 1
    assert facts.keys() == {"kind", "format"} | {field.name for field in dataclasses.fields(Result)}
    assert facts["published"] == {"fid": 3.3, "inception_score": 274.4, "band": [3.3, 3.6], "inside": False}
    assert facts["per_class"] == [{"id": 0, "name": "tench", "n": 2, "spread": 11.5}]
    assert facts["reference"]["n"] == 50_000


def test_lines_say_figures_and_what_decides_them():
    lines = dict(SAMPLES.lines())
    assert lines["FID"] == "9.50 (FID∞ 3.25, an estimate for any number of images)"
    assert lines["inception score"] == "250.00 ± 3.00"
    assert lines["images"] == "2000, 1000 classes"
    assert lines["checkpoint"] == "var-d16, sha256 5e5e5e5e5e5e"
    assert "cfg 1.5, top-k 900, top-p 0.96" in lines["settings"]
    assert "seed 7" in lines["settings"]
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
    found = dict(dataclasses.replace(SAMPLES, metrics=metrics, checkpoint=None, published=None).lines())
    assert found["rFID"] == "21.50"
    assert found["PSNR, dB"] == "19.46"
    assert found["codebook in use, scale by scale"] == "6 50 100 %"
    assert "settings" not in found
