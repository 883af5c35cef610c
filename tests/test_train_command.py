"""`var train`: both commands end to end on a small made-up data set."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from support.images import write_folder
from varcli.cli import run

SHAPE = ["--sides", "1,2,4", "--base-width", "32", "--multipliers", "1,1", "--encoder-blocks", "1"]
SMALL = [*SHAPE, "--codebook-size", "32", "--codebook-width", "8", "--lpips", "0"]
PACE = [
    "--batch-size",
    "4",
    "--epochs",
    "1",
    "--holdout",
    "2",
    "--device",
    "cpu",
    "--workers",
    "0",
    "--base-lr",
    "0.05",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), {"n02099601": 8, "n01443537": 8, "n02123045": 8})


@pytest.fixture(scope="module")
def tokenizer(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    assert run(["train", "tokenizer", str(data), "--out", str(out), *SMALL, *PACE, "-q"]) == 0
    return out / "tokenizer.safetensors"


def transformer_command(data, tokenizer, out, *more):
    shape = ["--tokenizer", str(tokenizer), "--depth", "2", "--width", "64"]
    return ["train", "transformer", str(data), "--out", str(out), *shape, *PACE, *more]


def test_from_images_to_images(data, tokenizer, tmp_path, capsys):
    assert run(transformer_command(data, tokenizer, tmp_path / "run", "--json")) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert figures["step"] == 5  # 18 images, 4 an update
    assert {"validation_loss", "validation_accuracy_last", "images_per_second"} <= figures.keys()
    assert "step 5/5" in printed.err
    with Image.open(tmp_path / "run" / "samples" / "0000005.png") as sheet:
        assert sheet.width > 300
    image = tmp_path / "dog.png"
    sample = ["sample", "-m", figures["checkpoint"], "-c", "golden retriever", "-o", str(image), "--device", "cpu"]
    assert run(sample) == 0
    with Image.open(image) as made:
        assert made.size == (8, 8)


def test_finished_run_is_left_as_it_is(data, tokenizer, tmp_path, capsys):
    command = transformer_command(data, tokenizer, tmp_path)
    assert run(command) == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    assert run(command) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert run([*command, "--seed", "7"]) == 2
    assert "seed 0 (now 7)" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_process_goes_on_and_ends_bit_identical(data, tmp_path):
    command = [sys.executable, "-m", "varcli", "train", "tokenizer", str(data), *SMALL, *PACE]
    command += ["--epochs", "8", "--save-every", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    killed = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "state.safetensors").exists():
        time.sleep(0.01)
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run([*command, "--out", str(tmp_path / "killed")], env=environment, check=True, capture_output=True)
    for name in ("tokenizer.safetensors", "state.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_dry_run_prints_the_plan_and_writes_nothing(data, tokenizer, tmp_path, capsys):
    out = tmp_path / "none"
    assert run(transformer_command(data, tokenizer, out, "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 5
    assert plan["recipe"]["base_lr"] == 0.05
    assert plan["expected_loss"] > 5
    assert run(transformer_command(data, tokenizer, out, "--dry-run")) == 0
    assert "expected loss" in capsys.readouterr().out
    assert run(["train", "tokenizer", str(data), "--out", str(out), *SMALL, "--lpips", "1", "--dry-run"]) == 0
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--sides", "1,x"], 2, "--sides must be whole numbers"),
        (["--sides", "2,4"], 2, "sides must begin with 1"),
        (["--base-width", "40"], 2, "base width must be a multiple of 32 (got 40)"),
        (["--holdout", "8"], 2, "--holdout must be at least 0"),
        (["--batch-size", "0"], 2, "--batch-size must be at least 1 (got 0)"),
        (["--epochs", "inf"], 2, "--epochs must be a finite number (got inf)"),
        (["--grad-accum", "3"], 2, "--grad-accum must divide the batch of 4 (got 3)"),
        (["--lpips", "1", "--lpips-weights", "nowhere"], 4, "LPIPS weights"),
        (["--device", "cuda:9"], 2, "no device cuda:9"),
    ],
)
def test_bad_options_end_in_one_line(more, code, message, data, tmp_path, capsys):
    command = ["train", "tokenizer", str(data), "--out", str(tmp_path / "run"), *SMALL, *PACE]
    assert run([*command, *more]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_bad_inputs_end_in_one_line(data, tokenizer, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    cases = [
        (["train", "tokenizer", str(data), "--out", str(tmp_path / "file" / "run"), *SMALL, *PACE], 5),
        (transformer_command(data, tokenizer, tmp_path / "file" / "run"), 5),
        (["train", "tokenizer", str(tmp_path / "empty"), "--out", str(tmp_path / "a"), *SMALL], 3),
        (["train", "tokenizer", str(tmp_path / "absent"), "--out", str(tmp_path / "a"), *SMALL], 3),
        (transformer_command(data, tmp_path / "absent.safetensors", tmp_path / "a"), 4),
        (transformer_command(data, data / "n02099601" / "n02099601_0.png", tmp_path / "a"), 4),
    ]
    for command, code in cases:
        assert run(command) == code
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "a").exists()


def test_a_tokenizer_is_found_and_refused_as_a_checkpoint_is(data, tokenizer, tmp_path, capsys):
    """`--tokenizer` says what `--checkpoint` says of a file of another kind, a folder or an unknown name."""
    (tmp_path / "vae.pth").write_bytes(b"PK")
    cases = {
        tmp_path / "vae.pth": "vae.pth must be converted first: var checkpoints convert",
        tokenizer.parent: f"is a folder; its tokenizer is {tokenizer}",
        tokenizer.parent / "state.safetensors": "is the state of a training run; the model is beside it",
        "tiny6": "there is no checkpoint tiny6: neither a file nor one of the names tiny64",
    }
    for given, line in cases.items():
        assert run(transformer_command(data, given, tmp_path / "a")) == 4
        err = capsys.readouterr().err
        assert line in err and err.count("\n") == 1
        assert not (tmp_path / "a").exists()


def test_tensorboard_gets_the_figures(data, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    command = ["train", "tokenizer", str(data), "--out", str(tmp_path), *SMALL, *PACE, "--tensorboard", "-q"]
    assert run(command) == 0
    written = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "validation/psnr"} <= set(written.Tags()["scalars"])
