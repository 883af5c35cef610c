"""`var eval`: what it measures, what it says of it, and that nothing but the images decides the figures.

The network is a quick stand-in; tests of `evaluation` hold the true one to torch-fidelity.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import varcli
from support import extractors, small
from support.fork_server import python
from support.reference_images import reference_images
from varcli import cli
from varcli.classes import imagenet
from varcli.errors import InputError, UsageError
from varcli.evaluation import comparability, distances, feature_pass
from varcli.evaluation.extractors import EXTRACTORS, Features
from varcli.evaluation.statistics import FeatureShape
from varcli.models.efficientnet import EfficientNetLite0
from varcli.pipelines import evaluate as pipeline

pytestmark = pytest.mark.slow

NAMES = {class_id: imagenet().by_id(class_id).name for class_id in small.CLASSES}
EACH = 8
COUNT = EACH * len(small.CLASSES)


class Projection:
    """Features of images by a fixed random projection: another image has other features."""

    name, device, sha256 = "projection", torch.device("cpu"), "0f" * 32
    figure, shape, downloaded = "fid", FeatureShape(pool=2048, classes=1008), True

    def __init__(self, weights, device):
        self.weights = weights

    def features(self, pixels_BHW3):
        cells = torch.from_numpy(np.ascontiguousarray(pixels_BHW3)).float().permute(0, 3, 1, 2) / 64 - 2
        cells = nn.functional.adaptive_avg_pool2d(cells, 4).flatten(1)
        noise = torch.Generator().manual_seed(0)
        return Features(
            cells @ torch.randn(48, 2048, generator=noise) / 7, cells @ torch.randn(48, 1008, generator=noise)
        )


def mean_distance(given, reference):
    """Stand for the Fréchet distance, whose eigenvalues take long: that of the means alone."""
    return float(np.square(given.mean - reference.mean).sum())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture
def measure(model, monkeypatch, tmp_path, capsys):
    """Run `var eval` with the small model; return the result."""
    (tmp_path / "inception.pth").touch()
    monkeypatch.setenv("VAR_CHECKPOINT", str(model))
    monkeypatch.setenv("VAR_INCEPTION", str(tmp_path / "inception.pth"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(EXTRACTORS, "inception-v3-compat", Projection)
    monkeypatch.setattr(distances, "frechet_distance", mean_distance)
    monkeypatch.setattr(distances, "frechet_infinity", lambda statistics, reference: 0.5)
    monkeypatch.setattr(distances, "ENOUGH_FOR_A_LINE", COUNT)

    def run(*arguments, code=0):
        assert cli.run(["eval", "--device", "cpu", "--dtype", "fp32", "--json", *map(str, arguments)]) == code
        out, err = capsys.readouterr()
        return (json.loads(out) if out else None), err

    return run


def sample(*arguments):
    """Run `var sample` as images are made for measuring."""
    assert cli.run(["sample", "--preset", "metrics", "--dtype", "fp32", "--quiet", *map(str, arguments)]) == 0


def photographs(folder, count=COUNT, side=16, seed=5):
    """Write images that no model made; return the folder."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate(np.random.RandomState(seed).randint(0, 256, (count, side, side, 3)).astype(np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


# --- what is measured ------------------------------------------------------------------------------


def test_images_made_measure_as_the_same_images_in_files(measure, tmp_path):
    reference = photographs(tmp_path / "photographs")
    made, _ = measure("--num-images", COUNT, "--reference", reference, "--fid", "--is", "--prc")
    sample("-c", "all", "-n", EACH, "-o", "made")
    sample("-c", "all", "-n", EACH, "-o", "made.npz")
    for output in ("made", "made.npz"):
        given, _ = measure(output, "--reference", reference, "--fid", "--is", "--prc")
        assert given["n"] == made["n"] == COUNT
        for name in ("fid", "inception_score", "precision", "recall"):
            assert given["metrics"][name] == pytest.approx(made["metrics"][name], rel=1e-9)
        assert given["classes"] == len(small.CLASSES)
    assert made["what"] == "samples"
    assert made["checkpoint"]["cfg"] == 1.5
    assert made["reference"]["n"] == COUNT
    assert made["reference"]["pixels"] == 16


def test_by_default_fid_and_inception_score(measure, tmp_path):
    found, _ = measure("--num-images", COUNT, "--reference", photographs(tmp_path / "photographs"))
    names = {"fid", "fid_infinity", "fid_bias", "inception_score", "inception_score_std"}
    assert found["metrics"].keys() == names
    assert found["protocol"]["is_splits"] == 10


def test_the_order_of_images_changes_nothing(measure, tmp_path, monkeypatch):
    folder = photographs(tmp_path / "photographs")
    names = sorted(map(str, folder.iterdir()))
    wanted, _ = measure(folder, "--is")
    monkeypatch.setattr(sys, "stdin", StringIO("\n".join(reversed(names))))
    found, _ = measure("-", "--is")
    assert found["metrics"] == wanted["metrics"]


def test_statistics_kept_are_a_reference(measure, tmp_path):
    measure(photographs(tmp_path / "photographs"), "--is", "--fid", "-r", "photographs", "--save-stats", "kept.npz")
    found, _ = measure("photographs", "--fid", "--reference", "kept.npz")
    assert found["metrics"]["fid"] == pytest.approx(0, abs=1e-12)
    assert found["reference"]["name"] == "kept.npz"
    with np.load("kept.npz") as kept:
        assert kept["mu"].shape == (2048,)
        assert kept["sigma"].shape == (2048, 2048)


def test_eval_stats(measure, tmp_path, capsys):
    photographs(tmp_path / "photographs")
    assert cli.run(["eval", "stats", "photographs", "-o", "made.npz", "--device", "cpu", "--keep-features"]) == 0
    assert capsys.readouterr().out == "made.npz\n"
    assert not list((tmp_path / "cache").rglob("measurements/*"))
    found, _ = measure("photographs", "--fid", "--prc", "--reference", "made.npz")
    assert found["metrics"]["fid"] == pytest.approx(0, abs=1e-12)
    assert found["metrics"]["precision"] == found["metrics"]["recall"] == 1


def test_a_tokenizer_is_measured_by_what_it_loses(measure, tmp_path):
    photographs(tmp_path / "photographs")
    found, err = measure("photographs", "--tokenizer")
    assert found["what"] == "tokenizer"
    assert found["metrics"].keys() >= {"rfid", "psnr", "ssim", "codebook_usage"}
    assert len(found["metrics"]["codebook_usage"]) == len(small.SIDES)
    assert found["reference"]["name"] == "the same images"
    assert found["metrics"]["rfid"] > 0
    assert "without LPIPS" in err
    assert cli.run(["reconstruct", *map(str, Path("photographs").iterdir()), "--json", "--device", "cpu"]) == 0


class Corners(Projection):
    """With spatial features: the four corners."""

    shape = FeatureShape(pool=2048, classes=1008, spatial=12)

    def features(self, pixels_BHW3):
        corners = torch.from_numpy(pixels_BHW3[:, [0, 0, -1, -1], [0, -1, 0, -1]]).float().flatten(1)
        return dataclasses.replace(super().features(pixels_BHW3), spatial_BF=corners)


def test_metrics_of_samples_alone_are_refused_for_a_tokenizer_in_python_too(model, tmp_path):
    photographs(tmp_path / "photographs")
    loaded = varcli.load(model, device="cpu")
    with pytest.raises(UsageError, match="--tokenizer cannot be used with --is: it measures FID"):
        varcli.evaluate(loaded, ("is",), tokenizer=True, paths=[str(tmp_path / "photographs")])


def test_a_tokenizer_is_measured_on_pixels_alone_without_a_network(measure, tmp_path, monkeypatch):
    photographs(tmp_path / "photographs")
    whole, _ = measure("photographs", "--tokenizer")
    monkeypatch.setattr(pipeline, "find_weights", None)  # nothing is looked for
    monkeypatch.delitem(EXTRACTORS, "inception-v3-compat")
    found, _ = measure("photographs", "--tokenizer", "--features", "none")
    assert found["metrics"] == {name: whole["metrics"][name] for name in ("psnr", "ssim", "codebook_usage")}
    assert found["warnings"] == [] and found["per_class"] is None and found["reference"] is None
    assert cli.run(["eval", "stats", "photographs", "--features", "none", "-o", "x.npz"]) == 3  # without features


@pytest.mark.parametrize("reference", [(), ("--reference", "photographs")])
def test_a_tokenizer_is_measured_by_spatial_features_too(measure, tmp_path, monkeypatch, reference):
    monkeypatch.setitem(EXTRACTORS, "inception-v3-compat", Corners)
    photographs(tmp_path / "photographs")
    found, _ = measure("photographs", "--tokenizer", "--fid", "--sfid", *reference)
    assert found["metrics"]["rsfid"] > 0 and found["metrics"]["rfid"] > 0


def test_images_made_are_kept_where_asked(measure, tmp_path):
    measure("--num-images", COUNT, "--is", "--save-images", "made")
    sample("-c", "all", "-n", EACH, "-o", "wanted")
    found, wanted = ({path.name: path.read_bytes() for path in Path(folder).iterdir()} for folder in ("made", "wanted"))
    assert found.keys() == wanted.keys()
    assert found == wanted


def test_a_file_for_reports_has_images(measure, tmp_path):
    found, _ = measure("--num-images", COUNT, "--is", "--out", "result.json")
    kept = json.loads(Path("result.json").read_text())
    assert len(kept.pop("images")) == 24
    assert kept == found
    assert cli.run(["report", "result.json", "-o", "page.html"]) == 0
    assert "small" in Path("page.html").read_text()


class Nearness(nn.Module):
    """Stands for LPIPS, whose weights nobody has here."""

    def forward(self, made_B3PP, image_B3PP):
        assert made_B3PP.min() >= -1 and made_B3PP.max() <= 1 and image_B3PP.min() < -0.9
        return made_B3PP.new_tensor(0.25)


def test_a_tokenizer_is_measured_by_lpips_where_its_weights_are(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_lpips", lambda folder: Nearness())
    photographs(tmp_path / "photographs")
    found, err = measure("photographs", "--tokenizer")
    assert found["metrics"]["lpips"] == pytest.approx(0.25)
    assert "LPIPS" not in err


# --- rejection -------------------------------------------------------------------------------------


class Redness(nn.Module):
    """Is the surer of every class the redder an image is."""

    def forward(self, image_B3PP: torch.Tensor) -> torch.Tensor:
        red_B = image_B3PP[:, 0].mean((1, 2)) - image_B3PP[:, 1].mean((1, 2))
        return torch.stack([red_B * 0, red_B * 9, red_B * 9, red_B * 9, red_B * 9], 1)


def test_samples_of_two_settings_in_one_folder_are_told(measure):
    sample("-c", "all", "-n", 2, "-o", "mixed")
    alone, _ = measure("mixed", "--is")
    sample("-c", "all", "-n", 2, "--cfg", 3, "-o", "mixed")
    together, _ = measure("mixed", "--is")
    told = [line for line in together["warnings"] if line.startswith("images of 2 models or settings")]
    assert len(told) == 1 and ": 10 by checkpoint " in told[0] and "cfg 3.0" in told[0]
    assert together["n"] == 2 * alone["n"] and not any("models or settings" in line for line in alone["warnings"])


@pytest.fixture
def redness(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Redness()), str(tmp_path / "redness.pt"))


@pytest.mark.usefixtures("redness")
def test_images_chosen_early_are_those_of_var_sample(measure):
    choosing = ("--best-of", 2, "--decide-at", 2, "--classifier", "redness.pt")
    found, _ = measure("--num-images", 10, "--is", *choosing, "--save-images", "kept")
    sample("-c", "all", "-n", 2, *choosing, "-o", "sampled")
    kept = {path.name: path.read_bytes() for path in Path("kept").glob("*.png")}
    assert kept == {path.name: path.read_bytes() for path in Path("sampled").glob("*.png")}
    assert len(kept) == found["n"] == 10
    assert found["protocol"]["decide_at"] == 2


@pytest.mark.usefixtures("redness")
def test_rejected_are_those_the_classifier_doubts_most(measure):
    rejecting = ("--num-images", 10, "--is", "--best-of", 2, "--classifier", "redness.pt", "--save-images", "kept")
    found, _ = measure(*rejecting)
    sample("-c", "all", "-n", 4, "-o", "drawn")

    def redness(path):
        pixels = np.asarray(Image.open(path)).astype(float)
        return pixels[..., 0].mean() - pixels[..., 1].mean()

    for class_id in small.CLASSES[1:]:
        drawn = sorted(Path("drawn").glob(f"{class_id}-*"), key=redness)
        assert {path.name for path in Path("kept").glob(f"{class_id}-*")} == {path.name for path in drawn[2:]}
    assert found["n"] == 10
    assert found["protocol"]["best_of"] == 2


# --- going on --------------------------------------------------------------------------------------


def test_class_agreement_is_what_the_network_says_of_each_image(measure, tmp_path):
    images, labels = reference_images(20)
    for i, (image, entry) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "images" / entry.wnid
        folder.mkdir(parents=True, exist_ok=True)
        pixels = ((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    found, _ = measure("images", "--agreement", "--features", "efficientnet-lite0")
    known = torch.tensor(sorted({entry.id for entry in labels}))
    best = known[EfficientNetLite0()(images)[:, known].topk(5).indices]
    right = best == torch.tensor([entry.id for entry in labels])[:, None]
    assert 0 < right[:, 0].sum() < right.any(1).sum() < 20
    assert found["metrics"] == {
        "agreement": pytest.approx(right[:, 0].float().mean().item()),
        "agreement_top5": pytest.approx(right.any(1).float().mean().item()),
    }
    assert found["reference"] is None


def test_class_agreement_of_a_tokenizer_and_of_samples(measure, tmp_path):
    for class_id in small.CLASSES:
        photographs(tmp_path / "photographs" / imagenet().by_id(class_id).wnid, EACH, seed=class_id)
    network = ("--agreement", "--features", "efficientnet-lite0")
    of_tokenizer, _ = measure("photographs", "--tokenizer", *network)
    assert 0 <= of_tokenizer["metrics"]["agreement"] <= of_tokenizer["metrics"]["agreement_top5"] <= 1
    assert "psnr" in of_tokenizer["metrics"]
    of_samples, _ = measure("-n", COUNT, "--fid", "-r", "photographs", *network)
    assert of_samples["metrics"].keys() >= {"fd_efficientnet", "agreement", "agreement_top5"}
    # Beside both stands the agreement of the photographs themselves.
    of_themselves, _ = measure("photographs", *network)
    for found in (of_tokenizer, of_samples):
        for name in ("agreement", "agreement_top5"):
            beside = found["metrics"][name.replace("agreement", "agreement_reference")]
            assert beside == pytest.approx(of_themselves["metrics"][name])


@pytest.mark.parametrize(
    ("names", "message"), [((), "needs images whose classes are known"), (("cat", "dog"), "needs ImageNet's classes")]
)
def test_class_agreement_needs_known_classes(measure, tmp_path, names, message):
    for folder in [tmp_path / "photographs" / name for name in names] or [tmp_path / "photographs"]:
        photographs(folder, 3)
    _, error = measure("photographs", "--agreement", "--features", "efficientnet-lite0", code=3)
    assert message in error


def test_killed_it_goes_on_where_it_was(measure, tmp_path, monkeypatch, capsys):
    reference = photographs(tmp_path / "photographs")
    wanted, _ = measure("--num-images", COUNT, "--reference", reference, "--seed", 0)
    monkeypatch.setattr(feature_pass, "ROUNDS", {"cpu": 8})
    monkeypatch.setattr(feature_pass, "SAVE_IMAGES", 8)
    seen = []
    whole = Projection.features

    def interrupted(self, pixels_BHW3):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(pixels_BHW3))
        return whole(self, pixels_BHW3)

    monkeypatch.setattr(Projection, "features", interrupted)
    assert cli.run(["eval", "-n", str(COUNT), "-r", str(reference), "--dtype", "fp32", "--device", "cpu"]) == 130
    assert sum(seen) == 24
    assert "stopped after 24 images; the same command resumes from there" in capsys.readouterr().err
    monkeypatch.setattr(Projection, "features", whole)
    found, err = measure("--num-images", COUNT, "--reference", reference, "--seed", 0)
    assert f"images: resuming after 24 of {COUNT}" in err
    assert found["metrics"] == pytest.approx(wanted["metrics"], rel=1e-9)
    assert not list((tmp_path / "cache").rglob("measurements/*"))


def test_two_processes_find_what_one_finds(model, tmp_path):
    """For real: two processes that talk through gloo, and the true network with random weights."""
    weights = extractors.save(tmp_path / "inception.pth")
    variables = {"VAR_INCEPTION": str(weights), "XDG_CACHE_HOME": str(tmp_path / "cache"), "VAR_CHECKPOINT": str(model)}
    command = [python(), "-m", "varcli", "eval", "--num-images", "15", "--is", "--prc", "--reference", "photographs"]
    photographs(tmp_path / "photographs", 6)
    found = []
    for processes in ("1", "2"):
        words = [*command, "--nproc", processes, "--dtype", "fp32", "--device", "cpu", "--json", "--quiet"]
        streams = {"capture_output": True, "text": True}
        done = subprocess.run(words, check=False, env=os.environ | variables, cwd=tmp_path, timeout=300, **streams)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"], rel=1e-6)
    assert found[0]["n"] == found[1]["n"] == 15


# --- what is said ----------------------------------------------------------------------------------


def test_whether_the_paper_is_met_is_said_only_of_what_can_be_compared(measure, monkeypatch, tmp_path, model):
    from varcli.checkpoints import registry

    entry = dataclasses.replace(registry.registry()["var-d16"], fid=3.3, fid_band=(0, 1e9), reference="photographs")
    known = dict(registry.registry()) | {str(model): entry}
    monkeypatch.setattr(pipeline, "registry", lambda: known)
    monkeypatch.setattr(comparability, "FEW", 10)  # so few are enough here
    photographs(tmp_path / "photographs")
    photographs(tmp_path / "others")
    found, _ = measure("--num-images", COUNT, "--reference", "photographs")
    assert found["published"] == {"fid": 3.3, "inception_score": 274.4, "band": [0, 1e9], "inside": True}
    for changed in (("--cfg", 2), ("--reference", "others")):
        found, _ = measure("--num-images", COUNT, "--reference", "photographs", *changed)
        assert found["published"]["inside"] is None


def test_what_is_incomparable_is_said_twice(measure, tmp_path):
    arguments = ("--num-images", COUNT - 1, "--cfg", 4, "--is")
    found, err = measure(*arguments)
    for words in ("only 39 images", "classes are not balanced", "cfg 4.0 instead of 1.5"):
        assert any(words in warning for warning in found["warnings"])
        assert f"var: warning: {next(w for w in found['warnings'] if words in w)}" in err


def test_jpeg_and_another_size_than_the_reference(measure, tmp_path):
    photographs(tmp_path / "small", side=16)
    (tmp_path / "large").mkdir()
    for path in sorted((tmp_path / "small").iterdir()):
        Image.open(path).resize((32, 32)).save(tmp_path / "large" / f"{path.stem}.jpg")
    found, _ = measure("large", "--fid", "--reference", "small")
    assert any("40 of 40 images are JPEG" in warning for warning in found["warnings"])
    assert any("32 pixels per side against a reference of 16" in warning for warning in found["warnings"])


def test_block_of_text(measure, tmp_path, capsys):
    photographs(tmp_path / "photographs")
    assert cli.run(["eval", "photographs", "-r", "photographs", "--device", "cpu"]) == 0
    lines = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert re.fullmatch(r"0\.00 \(FID∞ 0\.50, .*\)", lines["FID"])
    assert lines["images"] == str(COUNT)
    assert "0f0f0f0f0f0f" in lines["extractor"]
    assert lines["reference"].startswith("photographs, sha256 ")


# --- from Python -----------------------------------------------------------------------------------


def test_images_in_memory_measure_as_the_same_images_in_files(measure, model, tmp_path):
    reference = photographs(tmp_path / "photographs")
    images = varcli.load(model, device="cpu", dtype="fp32").sample(list(NAMES), count=6)
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i:03}.png")
    in_files, _ = measure(*sorted(tmp_path.glob("*.png")), "--fid", "--prc", "--reference", reference)
    settings = {"metrics": ("fid", "prc"), "reference": str(reference), "device": "cpu"}
    for source in (images, np.stack([image.array for image in images]), (image.array for image in images)):
        found = varcli.evaluate(source, weights=tmp_path / "inception.pth", **settings)
        assert found.n == len(images)
        for name in ("fid", "precision", "recall"):
            assert found.metrics[name] == pytest.approx(in_files["metrics"][name], rel=1e-9)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((8, 8, 3))] * 12, r"images must be uint8 (height, width, 3) (got float64 (8, 8, 3))"),
        ([np.zeros((8, 8), np.uint8)] * 12, r"images must be uint8 (height, width, 3) (got uint8 (8, 8))"),
        (
            [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)],
            "images must have one size (got (8, 8) and (9, 8))",
        ),
        ([], "no path of images was given"),
    ],
)
def test_images_in_memory_that_cannot_be_measured_are_refused(measure, tmp_path, images, message):
    with pytest.raises(InputError) as refused:
        varcli.evaluate(images, ("is",), weights=tmp_path / "inception.pth", device="cpu")
    assert str(refused.value) == message


# --- another extractor -----------------------------------------------------------------------------


class Brightness:
    """An extractor made up for this test: the mean of each channel."""

    name, figure, device, sha256 = "brightness", "fd_brightness", torch.device("cpu"), "b1" * 32
    shape, downloaded = FeatureShape(pool=3), True

    def __init__(self, weights, device):
        pass

    def features(self, pixels_BHW3):
        return Features(torch.from_numpy(pixels_BHW3.mean((1, 2), dtype=np.float32)))


def test_an_extractor_is_one_object(measure, tmp_path, monkeypatch):
    monkeypatch.setitem(EXTRACTORS, "brightness", Brightness)
    monkeypatch.setattr(pipeline, "find_weights", lambda name, given, progress: None)
    one, other = photographs(tmp_path / "one"), photographs(tmp_path / "other", seed=6)
    found, _ = measure(one, "--features", "brightness", "--reference", other)
    assert found["extractor"] == {"name": "brightness", "sha256": "b1" * 32}
    assert {"fd_brightness", "fd_brightness_infinity"} <= found["metrics"].keys()
    monkeypatch.setattr(pipeline, "find_weights", None)  # what cannot be is said before anything is downloaded
    measure(one, "--features", "brightness", "--is", code=3)
    measure(one, "--features", "darkness", code=2)


# --- what is said of images and the machine --------------------------------------------------------


def test_what_was_found_and_left_out_is_said(measure, tmp_path):
    photographs(tmp_path / "photographs", 12)
    (tmp_path / "photographs" / "x.heic").write_bytes(b"x")
    _, err = measure("photographs", "--is")
    assert err.splitlines()[:2] == [
        "var: data: 12 images",
        "var: data: left out: files named .heic (1): photographs/x.heic",
    ]


@pytest.mark.parametrize("below", ["cache", "cache/varcli"])
def test_without_a_cache_it_measures_all_the_same(measure, tmp_path, below):
    photographs(tmp_path / "one", 12)
    photographs(tmp_path / "two", 12, seed=1)
    kept, _ = measure("one", "--fid", "--is", "--reference", "two")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / below).parent.mkdir(exist_ok=True)
    (tmp_path / below).touch()  # in place of a folder
    found, err = measure("one", "--fid", "--is", "--reference", "two")
    assert found["metrics"] == kept["metrics"]
    assert err.count("measuring the reference two first, without keeping it: ") == 1
    assert err.count("measuring without saving progress: ") == 2


def test_a_reference_of_photographs_is_resized(measure, tmp_path):
    photographs(tmp_path / "odd", 12)
    Image.new("RGB", (20, 30)).save(tmp_path / "odd" / "tall.png")
    found, err = measure("--fid", "-n", 10, "-r", "odd", code=3)
    assert "or --resize SIDE crops and resizes them" in err
    found, _ = measure("--fid", "-n", 10, "-r", "odd", "--resize", 16)
    assert found["reference"]["pixels"] == 16


def test_figures_that_are_no_numbers_are_refused(measure, tmp_path, monkeypatch):
    photographs(tmp_path / "one", 12)
    monkeypatch.setattr(distances, "inception_score", lambda sums: (float("nan"), 0.0))
    assert "var: error: inception_score is nan: " in measure("one", "--is", code=3)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="names elsewhere are text")
def test_names_on_stdin_may_be_no_text(measure, tmp_path, monkeypatch):
    photographs(tmp_path / "one", 12)
    (tmp_path / "one" / "000.png").rename(tmp_path / "one" / os.fsdecode(b"caf\xe9.png"))
    names = b"\n".join(bytes(path) for path in (tmp_path / "one").iterdir())
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(names), encoding="utf-8"))
    assert measure("-", "--is")[0]["n"] == 12


# --- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["photographs", "--num-images", "9"],
            2,
            "--num-images is for images to be sampled, not for images that exist",
        ),
        (["photographs", "--cfg", "2"], 2, "--cfg is for images to be sampled"),
        (["photographs", "--cfg", "0"], 2, "--cfg is for images to be sampled"),
        (["--is", "--save-stats", "s.npz"], 2, "--save-stats needs --fid"),
        (["--save-images", "-"], 2, "--save-images must be a folder, .npz or .tar: stdout has the result (got -)"),
        (["--save-images", "one.png"], 2, "one.png is one file, but there are several images"),
        (["--top-p", "2", "--fid"], 2, "--top-p must be between 0 (off) and 1 (got 2)"),
        (["--resize", "64"], 2, "--resize is for images that exist"),
        (["--best-of", "0.5"], 2, "--best-of must be at least 1 (got 0.5)"),
        (["--is", "--decide-at", "2"], 2, "--decide-at needs --best-of"),
        (["photographs", "--decide-at", "2"], 2, "--decide-at is for images to be sampled"),
        (["--tokenizer", "--kid"], 2, "--tokenizer cannot be used with --kid: it measures FID"),
        (["photographs", "--features", "none"], 2, "--features none is for --tokenizer, of which PSNR"),
        (["photographs", "--tokenizer", "--fid", "--features", "none"], 3, "--fid needs the features of another"),
        (["--tokenizer"], 2, "--tokenizer needs images that the tokenizer was not trained on"),
        (["--out", "result.txt"], 2, "--out must be a name ending in .json (got result.txt)"),
        (["--save-stats", "s.json"], 2, "--save-stats must be a name ending in .npz (got s.json)"),
        (
            ["--save-images", "x.npz", "--nproc", "2"],
            2,
            "--save-images must be a folder with several processes",
        ),
        (["--quantize", "int8"], 2, "--quantize int8 sets the precision, so leave --dtype out (got --dtype fp32)"),
        (["photographs", "--fid"], 2, "no reference is known for these images: give --reference, one of tiny64"),
        (["--fid"], 2, "no reference is known for these images"),
        (["nowhere", "--is"], 3, "nowhere"),
        (["photographs", "-r", "nowhere"], 3, "there is no reference nowhere: neither a file nor one of the names"),
        (["photographs", "-r", "empty.npz"], 3, "empty.npz"),
        (["photographs", "-r", "photographs", "--kid"], 3, "--kid needs at least 1000 images"),
        (["odd", "--is"], 3, "--resize"),
        (["broken", "--is"], 3, "1 of 2 images cannot be read"),
        (["nowhere", "--is", "--inception", "nowhere.pth"], 3, "cannot open nowhere"),
        (["--is", "--num-images", "5"], 3, "--is needs at least 10 images"),
        (["--is", "--inception", "nowhere.pth"], 4, "there is no weights file nowhere.pth"),
        (
            ["--is", "-n", "10", "--best-of", "2", "--classifier", "nobody"],
            2,
            "is neither a file nor a name: self, efficientnet-lite0, a torchvision model",
        ),
    ],
)
def test_mistakes(measure, tmp_path, arguments, code, message):
    photographs(tmp_path / "photographs", 12)
    photographs(tmp_path / "odd", 2)
    Image.new("RGB", (20, 16)).save(tmp_path / "odd" / "wide.png")
    photographs(tmp_path / "broken", 1)
    (tmp_path / "broken" / "cut.png").write_bytes(b"\x89PNG")
    np.savez(tmp_path / "empty.npz", nothing=np.zeros(3))
    found, err = measure(*arguments, code=code)
    assert found is None
    errors = [line for line in err.splitlines() if line.startswith("var: error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_reference_of_images_is_resized_as_the_others_are(measure, tmp_path):
    photographs(tmp_path / "odd", 12)
    Image.new("RGB", (20, 16)).save(tmp_path / "odd" / "wide.png")
    found, _ = measure("odd", "--fid", "--reference", "odd", "--resize", 8)
    assert found["metrics"]["fid"] == pytest.approx(0, abs=1e-12)
    assert found["reference"]["pixels"] == found["protocol"]["resize"] == 8


def test_bad_images_are_left_out_where_asked(measure, tmp_path):
    photographs(tmp_path / "broken", 12)
    (tmp_path / "broken" / "cut.png").write_bytes(b"\x89PNG")
    found, _ = measure("broken", "--is", "--skip-bad")
    assert found["n"] == 12
    assert any("left out as unreadable: 1 image: " in warning for warning in found["warnings"])


def test_too_few_are_left_when_bad_ones_are_left_out(measure, tmp_path):
    photographs(tmp_path / "broken", 11)
    for path in sorted((tmp_path / "broken").iterdir())[:3]:  # whole to their headers
        path.write_bytes(path.read_bytes()[:400])
    found, err = measure("broken", "--is", "--skip-bad", code=3)
    assert found is None
    assert "var: error: --is needs at least 10 images (got 8)" in err
