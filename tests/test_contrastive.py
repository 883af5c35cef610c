"""Condition contrastive alignment: its loss, its negatives, and a fine-tuning by it; merging as Neon does."""

import json
import math

import pytest
import torch

from support import small
from support.images import write_folder
from varcli.checkpoints.store import load_model
from varcli.cli import run
from varcli.training.finetune import contrastive_loss, other_labels
from varcli.training.parallel import Rows


def test_the_loss_is_the_papers():
    own, other, own_before, other_before = torch.rand(4, 3, 7).unbind()
    found = contrastive_loss(own, other, own_before, other_before, weight=3.0, beta=0.5)
    terms = []
    for i in range(3):
        ratio, other_ratio = (0.5 * float((b[i] - a[i]).sum()) for a, b in ((own, own_before), (other, other_before)))
        terms.append(-math.log(1 / (1 + math.exp(-ratio))) - 3 * math.log(1 / (1 + math.exp(other_ratio))))
    assert float(found) == pytest.approx(sum(terms) / 3 / 4)


def test_a_negative_is_another_class_and_a_part_draws_the_batchs():
    label = torch.randint(5, (64,))
    torch.manual_seed(3)
    other = other_labels(label, 5, Rows(0, 64, 64))
    assert (other != label).all()
    assert set(other.tolist()) == set(range(5))
    torch.manual_seed(3)
    assert torch.equal(other_labels(label[16:32], 5, Rows(16, 16, 64)), other[16:32])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folders = {"n01443537": 4, "n02099601": 4, "n02123045": 4, "n07873807": 4, "n11939491": 4}
    return write_folder(tmp_path_factory.mktemp("data"), folders)


def tune(model, data, out, *more):
    command = ["train", "transformer", str(data), "--init", str(model), "--out", str(out), "--batch-size", "10"]
    return run([*command, "--device", "cpu", "--workers", "0", "--base-lr", "0.02", "-q", *more])


@pytest.mark.slow
def test_fine_tuning_lowers_the_loss_below_that_of_equal_models(model, data, tmp_path, capsys):
    """While both models agree σ is 1/2, whatever λ."""
    assert tune(model, data, tmp_path, "--epochs", "40", "--cca", "1", "--cca-beta", "0.1", "--ema", "0") == 0
    figures = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["contrastive"] for line in figures if "contrastive" in line]
    assert losses[-1] < 0.4 < math.log(2)


def test_it_needs_a_model_to_contrast_with(data, tmp_path, capsys):
    command = ["train", "transformer", str(data), "--tokenizer", "tiny64", "--cca", "1", "--out", str(tmp_path / "x")]
    assert run(command) == 2
    assert "--cca contrasts with a trained model: give it with --init" in capsys.readouterr().err


def test_it_needs_two_classes(model, tmp_path, capsys):
    one = write_folder(tmp_path / "one", {"n01443537": 10})
    assert tune(model, one, tmp_path / "x", "--epochs", "1", "--cca", "1") == 2
    assert "--cca contrasts classes: the images must be of two or more (got 1)" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_merging_extrapolates_every_weight(model, data, tmp_path, capsys):
    assert tune(model, data, tmp_path, "--epochs", "2") == 0
    tuned, out = tmp_path / "model.safetensors", tmp_path / "merged.safetensors"
    assert run(["checkpoints", "merge", str(model), str(tuned), "--weight", "0.5", "-o", str(out)]) == 0
    ours, theirs, merged = (dict(load_model(path).transformer.named_parameters()) for path in (model, tuned, out))
    moved = 0
    for name, weight in merged.items():
        torch.testing.assert_close(weight, 1.5 * ours[name] - 0.5 * theirs[name])
        moved += not torch.equal(weight, ours[name])
    assert moved > 10
    assert run(["sample", "-m", str(out), "-c", "207", "-o", str(tmp_path / "a.png"), "-q"]) == 0


def test_models_that_do_not_belong_together_are_refused(model, data, tmp_path, capsys):
    out = tmp_path / "merged.safetensors"
    assert run(["checkpoints", "merge", str(model), "tiny64", "-o", str(out)]) == 4
    assert "has another shape than" in capsys.readouterr().err
    for weight in ("nan", "1e39"):
        words = [
            "checkpoints",
            "merge",
            str(model),
            str(model),
            "--weight",
            weight,
            "-o",
            str(tmp_path / "x.safetensors"),
        ]
        assert run(words) == 2
        assert "--weight must give finite weights" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    assert run(["checkpoints", "merge", str(model), str(model), "-o", str(model)]) == 2
    assert "is what is read, and would be replaced: give another name" in capsys.readouterr().err
    assert not out.exists()
