"""`var train status`: what is normal passes, and each planted fault is named."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from support.evaluations import write_run
from support.images import write_folder
from test_training import TOKENIZER, tokenizer_stage, train
from varcli.classes import ClassEntry, ClassTable
from varcli.cli import run
from varcli.config import GRID_256, TransformerConfig, TransformerTrainingConfig, transformer_recipe
from varcli.images.dataset import open_images
from varcli.models.tokenizer import Tokenizer
from varcli.training.data import TokenCache
from varcli.training.estimate import IMAGENET, expected_losses, expected_losses_at
from varcli.training.loop import Run
from varcli.training.metrics_log import MetricsLog
from varcli.training.status import check_lines
from varcli.training.transformer import TransformerStage, build_transformer

SMALL = TransformerConfig(depth=2, width=64, sides=(1, 2, 4), codebook_size=64, codebook_width=8, class_count=4)
D16 = TransformerConfig(depth=16, width=1024, sides=GRID_256, codebook_size=4096, codebook_width=32, class_count=1000)


def off(lines, settings, steps=100, copies=0.0):
    """The names of the checks that are off."""
    return {check.name for check in check_lines(lines, settings, steps, copies) if check.off}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("data"), {"blue": 10, "red": 10})
    return open_images([folder], require_labels=True, read_headers=False)


# --- faults planted in small runs ---------------------------------------------------------------------


def token_cache(count, seed, shuffled=False):
    """Token maps of four classes that prefer other rows, half of the tokens equal to the one before."""
    drawn = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    tokens = (4 * labels[:, None] + drawn.integers(24, size=(count, 21))).astype(np.uint8)
    for i in range(1, 21):
        same = drawn.random(count) < 0.5
        tokens[same, i] = tokens[same, i - 1]
    return TokenCache(tokens, set(), (drawn.permutation(labels) if shuffled else labels).tolist(), 1)


FAULTS = {
    "none": ({}, set()),
    "shuffled labels": ({"shuffled": True}, {"labels"}),
    "learning rate × 30": ({"base_lr": 0.6}, {"learning rate"}),
    "learning rate / 30": ({"base_lr": 0.02 / 30}, {"learning rate", "learned"}),
    "data too small": ({"count": 24, "epochs": 60}, {"data"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "named"), FAULTS.values(), ids=FAULTS)
def test_a_fault_planted_in_a_run_is_named(changes, named, tmp_path):
    settings = {"count": 400, "epochs": 4, "base_lr": 0.02, "shuffled": False} | changes
    recipe = TransformerTrainingConfig(batch=16, ema=0.9, epochs=settings["epochs"], base_lr=settings["base_lr"])
    classes = ClassTable(tuple(ClassEntry(i, str(i), str(i), ()) for i in range(4)))
    tokenizer = Tokenizer(dataclasses.replace(TOKENIZER, codebook_size=64)).eval()
    tokens, held = (token_cache(n, seed, settings["shuffled"]) for seed, n in enumerate((settings["count"], 64)))
    model = build_transformer(SMALL, recipe)
    stage = TransformerStage(model, recipe, tokenizer, classes, bf16=False, tokens=tokens, held=held)
    steps = recipe.steps(len(tokens))
    train(stage, Run(folder=tmp_path, steps=steps, batch=16, identity={}, log_every=10, validate_every=steps // 2))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert off(lines, dataclasses.asdict(SMALL) | dataclasses.asdict(recipe), steps) == named
    assert {f"{figure}_scale_{k}" for figure in ("loss", "validation_accuracy") for k in (1, 2, 3)} <= lines[-1].keys()


def test_a_collapsed_codebook_is_told_once_and_named(images, tmp_path):
    stage, told = tokenizer_stage(images), []
    stage.warn = told.append
    hits_SV = stage.model.quantize.ema_vocab_hit_SV
    hits_SV[:] = torch.tensor([1.0, 4.0, 16.0])[:, None]
    even = {name: figure.tolist() for name, figure in stage.observe(100).items()}
    assert even["codebook_perplexity"] == pytest.approx([32.0] * 3) and even["codebook_usage"] == [1.0] * 3
    hits_SV[1, 1:] = 0
    stage.observe(100)
    log = MetricsLog(tmp_path, 0, 4)
    log.write(100, {}, stage.observe(150))
    assert [line.partition(":")[0] for line in told] == ["scale 2 has collapsed"]
    settings = dataclasses.asdict(TOKENIZER) | {"base_lr": 0.06, "batch": 4}
    assert off([log.last], settings) == {"codebook"}
    assert log.last["codebook_perplexity_2"] == pytest.approx(1) and log.last["codebook_usage_2"] == 1 / 32


# --- made-up figures ------------------------------------------------------------------------------------


def published(loss, last, epochs):
    """The last line of a run of d16 on ImageNet, and its settings."""
    line = {"step": 1000 * epochs, "images_seen": epochs * IMAGENET, "loss": loss, "validation_loss": loss}
    line |= {"validation_loss_last": last, "validation_frequency_loss": 7.9, "validation_label_gain": 0.006}
    return [line], dataclasses.asdict(D16) | dataclasses.asdict(transformer_recipe(16))


def test_the_published_run_is_normal_all_along():
    for loss, last, epochs in ((6.376, 5.738, 19), (6.053, 5.308, 200)):
        assert off(*published(loss, last, epochs), 200_000) == set()
        expected = expected_losses_at(D16, epochs * IMAGENET)
        assert expected == (pytest.approx(loss, abs=0.02), pytest.approx(last, abs=0.02))
    assert expected_losses_at(D16) == expected_losses(16)
    assert max(expected_losses_at(D16, 1)) <= np.log(4096)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"validation_loss": 6.4, "loss": 6.4}, {"loss"}),
        ({"validation_label_gain": 0.0001}, {"labels"}),
        ({"loss": 5.6}, {"data"}),
        ({"validation_loss": 7.95, "loss": 7.95}, {"learned", "loss"}),
    ],
)
def test_what_is_off_in_a_run_of_d16_is_named(changes, named):
    (line,), settings = published(6.05, 5.31, 200)
    assert off([line | changes], settings, 200_000) == named


@pytest.mark.parametrize("depth", [16, 20, 24, 30, 36])
def test_published_learning_rates_are_normal_and_thirty_times_is_not(depth):
    recipe = transformer_recipe(depth)
    shape = dataclasses.asdict(D16) | {"depth": depth, "width": 64 * depth}
    for factor, named in ((1, set()), (1 / 6, set()), (30, {"learning rate"}), (1 / 30, {"learning rate"})):
        changed = dataclasses.replace(recipe, base_lr=recipe.base_lr * factor)
        assert off([{"step": 1, "images_seen": 1}], shape | dataclasses.asdict(changed)) == named


def test_the_loss_of_shortened_steps_is_not_taken_for_that_of_all_tokens():
    line = {"step": 1, "images_seen": 1, "loss": 3.0, "validation_loss": 3.6}
    line |= {"loss_scale_1": 2.0, "loss_scale_2": 2.0, "loss_scale_3": 4.0}  # 3.52 of all tokens
    settings = dataclasses.asdict(SMALL) | dataclasses.asdict(TransformerTrainingConfig(scale_drop=0.5))
    assert off([line], settings) == set()
    assert off([line], settings | {"scale_drop": 0.0}) == {"data"}


def test_copies_and_a_falling_psnr_are_named():
    settings = dataclasses.asdict(TOKENIZER) | {"base_lr": 0.06, "batch": 4}
    lines = [{"step": s, "images_seen": s, "validation_psnr": psnr} for s, psnr in ((1, 20.0), (2, 20.5), (3, 20.1))]
    assert off(lines[:2], settings) == set()
    assert off(lines, settings, copies=0.25) == {"data", "copies"}


# --- the command ----------------------------------------------------------------------------------------


def test_status_of_a_run(images, tmp_path, capsys):
    identity = dataclasses.asdict(TOKENIZER) | dataclasses.asdict(tokenizer_stage(images).training)
    settings = {"identity": identity, "images": {"blue": 8, "red": 8}, "copies": 0.5}
    train(tokenizer_stage(images), Run(folder=tmp_path, steps=4, batch=4, **settings))
    assert run(["train", "status", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "tokenizer, step 4 of 4, 16 images seen (1.0 epochs)"
    assert any(line.startswith("off\tcopies\t50.0% of the images are exact duplicates") for line in told)
    assert told[-1].startswith("copies: leave out the duplicates")
    assert run(["train", "status", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["stage"], found["step"], found["images"]) == ("tokenizer", 4, 16)
    assert {check["name"] for check in found["checks"] if check["off"]} == {"copies"}


def test_status_reads_the_state_before_a_damaged_one(images, tmp_path, capsys):
    identity = dataclasses.asdict(TOKENIZER) | dataclasses.asdict(tokenizer_stage(images).training)
    train(tokenizer_stage(images), Run(folder=tmp_path, steps=4, batch=4, save_every=2, identity=identity))
    (tmp_path / "state.safetensors").write_bytes(b"damaged")
    assert run(["train", "status", str(tmp_path)]) == 0
    (tmp_path / "state-previous.safetensors").write_bytes(b"damaged")
    assert run(["train", "status", str(tmp_path)]) == 3
    assert "state-previous.safetensors is damaged" in capsys.readouterr().err


def test_a_state_that_says_nothing_is_one_line(tmp_path, capsys):
    write_run(tmp_path)
    assert run(["train", "status", str(tmp_path)]) == 3
    assert "state.safetensors that does not say how it is trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "has no metrics.jsonl: give the folder of a run that has logged figures"),
        ({"metrics.jsonl": '{"step": 50, "images_seen": 800}\n'}, "has no state yet"),
    ],
)
def test_a_folder_without_a_run_is_one_line(files, line, tmp_path, capsys):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert run(["train", "status", str(tmp_path)]) == 3
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
