"""`var train`: both commands end to end on a small made-up data set."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

import varcli
from support.images import write_folder
from support.threads import one_thread
from varcli.checkpoints.safetensors_io import load_tensors
from varcli.checkpoints.store import load_tokenizer, save_tokenizer
from varcli.cli import run
from varcli.config import GRID_256, TokenizerConfig, TrainingConfig, TransformerConfig
from varcli.models.tokenizer import Tokenizer
from varcli.pipelines import train as pipeline
from varcli.pipelines import watch
from varcli.training import data as module
from varcli.training.estimate import expected_losses, expected_losses_at

pytestmark = pytest.mark.slow

SHAPE = ["--sides", "1,2,4", "--base-width", "32", "--multipliers", "1,1", "--encoder-blocks", "1"]
SMALL = [*SHAPE, "--codebook-size", "32", "--codebook-width", "8", "--perceptual", "none"]
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


def test_scale_drop_needs_a_scale_to_keep(data, tmp_path, capsys):
    shape = TokenizerConfig(sides=(1,), codebook_size=16, codebook_width=8, base_width=32, multipliers=(1, 1))
    save_tokenizer(tmp_path / "one.safetensors", Tokenizer(shape), {})
    words = ["--tokenizer", str(tmp_path / "one.safetensors"), "--out", str(tmp_path / "x"), "--depth", "1"]
    assert run(["train", "transformer", str(data), *words, *PACE, "--scale-drop", "0.5"]) == 2
    assert "--scale-drop leaves out the last scale, and this tokenizer has one scale only" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_of_another_shape_begins_with_the_weights_that_fit(data, tokenizer, tmp_path, capsys):
    command = ["train", "tokenizer", str(data), "--out", str(tmp_path), "--init", str(tokenizer), *PACE]
    still = ["--perceptual", "none", "--base-lr", "1e-30", "--weight-decay", "0"]  # what is trained stays as it began
    assert run([*command, "--sides", "1,2,8", "--multipliers", "1,2", *still]) == 0
    assert (
        "tensors are those of --init; the quantizer and tensors of another shape start from random weights"
        in capsys.readouterr().err
    )
    before, after = (load_tokenizer(path) for path in (tokenizer, tmp_path / "tokenizer.safetensors"))
    assert (after.config.codebook_size, after.config.sides) == (before.config.codebook_size, (1, 2, 8))
    begun, ended = before.state_dict(), after.state_dict()
    for name in ("encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.1.conv2.weight"):
        torch.testing.assert_close(ended[name], begun[name])
    assert not torch.allclose(ended["quantize.embedding.weight"], begun["quantize.embedding.weight"])


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


def test_runs_take_the_tokens_that_were_encoded_before(data, tokenizer, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    how = ["--holdout", "2", "--device", "cpu", "--workers", "0", "--crops", "2", "--flip"]
    assert run(["tokens", "encode", str(data), "--out", str(cache), "--tokenizer", str(tokenizer), *how]) == 0
    assert capsys.readouterr().out == f"{cache}\n"
    encode = module._encode

    def lacking(*arguments):
        raise AssertionError("tokens are computed again")

    monkeypatch.setattr(module, "_encode", lacking)
    command = transformer_command(data, tokenizer, tmp_path / "one", "--tokens", str(cache))
    assert run([*command, "--crops", "2", "--flip"]) == 0
    assert "token maps of" not in capsys.readouterr().err
    monkeypatch.setattr(module, "_encode", encode)
    assert run([*transformer_command(data, tokenizer, tmp_path / "two", "--tokens", str(cache)), "--crops", "4"]) == 0
    told = capsys.readouterr().err
    facts = "--resize-ratio 1.125, --seed 0, tokenizer "
    assert f"var: {cache} has no token maps of 18 images, --crops 4, {facts}" in told
    assert f"var: {cache} has token maps of 18 images, --crops 2, --flip, {facts}" in told


EVALUATE = ["--eval-every", "2", "--eval-features", "efficientnet-lite0"]


def test_evaluations_are_those_of_var_eval_and_change_nothing(data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(transformer_command(data, tokenizer, tmp_path / "plain", "-q")) == 0
    command = transformer_command(data, tokenizer, tmp_path / "run", *EVALUATE, "--eval-images", "9", "-q")
    assert run(command) == 0
    ours, plain = (load_tensors(tmp_path / name / "state.safetensors")[0] for name in ("run", "plain"))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_fd_efficientnet" in line] == [2, 4, 5]
    held = tmp_path / "held"
    for folder in data.iterdir():  # the last two of each class are held out
        (held / folder.name).mkdir(parents=True)
        for number in (6, 7):
            shutil.copy(folder / f"{folder.name}_{number}.png", held / folder.name)
    found = varcli.evaluate(
        varcli.load(tmp_path / "run" / "model.safetensors", device="cpu"),
        ["fid"],
        reference=str(held),
        num_images=9,
        resize=8,
        features="efficientnet-lite0",
    )
    assert lines[-1]["validation_fd_efficientnet"] == pytest.approx(found.metrics["fd_efficientnet"], rel=1e-6)


def test_a_tokenizer_is_evaluated_by_its_reconstructions(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ["train", "tokenizer", str(data), "--out", str(tmp_path / "run"), *SMALL, *PACE, *EVALUATE]
    assert run(command) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["validation_rfd_efficientnet"] > 0 for line in lines) and len(lines) == 3


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--holdout", "0"], "--eval-every measures against at least 2 held-out images: give --holdout (got 0 held"),
        (["--eval-images", "7"], "--eval-images must be at most the 6 images that are held out (got 7)"),
        (["--eval-features", "vgg"], "--eval-features must be one of dinov2, efficientnet-lite0, inception-v3-compat"),
    ],
)
def test_evaluations_that_cannot_be_are_refused_before_training(more, line, data, tmp_path, capsys):
    command = ["train", "tokenizer", str(data), "--out", str(tmp_path / "run"), *SMALL, *PACE, *EVALUATE]
    assert run([*command, *more, "-q"]) == 2
    assert capsys.readouterr().err.startswith(f"var: error: {line}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("begun", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_without_dtype_a_run_keeps_its_precision(stage, begun, data, tokenizer, tmp_path, monkeypatch, capsys):
    """Another machine, or another version, may take another one for the faster."""
    command = transformer_command(data, tokenizer, tmp_path, "-q", "--depth", "1")
    if stage == "tokenizer":
        command = ["train", "tokenizer", str(data), "--out", str(tmp_path), *SMALL, *PACE, "-q"]
    assert run([*command, "--dtype", begun, "--epochs", "1"]) == 0
    monkeypatch.setattr(pipeline, "trains_in_bf16", lambda device: begun == "fp32")
    (tmp_path / "state-previous.safetensors").write_bytes((tmp_path / "state.safetensors").read_bytes())
    (tmp_path / "state.safetensors").write_bytes(b"damaged")
    assert run([*command, "--epochs", "2"]) == 0
    _, metadata = load_tensors(tmp_path / "state.safetensors")
    assert json.loads(metadata["identity"])["bf16"] == (begun == "bf16")
    assert int(metadata["step"]) == 2 * 18 // 4
    other = {"fp32": "bf16", "bf16": "fp32"}[begun]
    assert run([*command, "--epochs", "2", "--dtype", other]) == 2
    assert f"was begun with --dtype {begun} (now {other})" in capsys.readouterr().err


def test_one_scale_is_trained_and_sampled(data, tmp_path, capsys):
    shape = [*SMALL, "--sides", "1", "--gan", "0"]
    assert run(["train", "tokenizer", str(data), "--out", str(tmp_path / "one"), *shape, *PACE, "-q"]) == 0
    trained = tmp_path / "one" / "tokenizer.safetensors"
    assert run(transformer_command(data, trained, tmp_path / "model", "-q")) == 0
    images = tmp_path / "images"
    words = ["--checkpoint", str(tmp_path / "model" / "model.safetensors"), "--class", "207", "--out", str(images)]
    assert run(["sample", *words, "-q"]) == 0
    assert len(list(images.glob("*.png"))) == 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_of_two_scales_the_last_may_be_left_out(dtype, data, tmp_path):
    shape = [*SMALL, "--sides", "1,2", "--gan", "0"]
    assert run(["train", "tokenizer", str(data), "--out", str(tmp_path / "two"), *shape, *PACE, "-q"]) == 0
    trained = tmp_path / "two" / "tokenizer.safetensors"
    more = ["--scale-drop", "0.9", "--dtype", dtype, "-q"]
    assert run(transformer_command(data, trained, tmp_path / "model", *more)) == 0


def test_finished_run_is_left_as_it_is(data, tokenizer, tmp_path, capsys):
    command = transformer_command(data, tokenizer, tmp_path)
    assert run(command) == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert run(command) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert re.search(r"var: nothing left to do: all \d+ steps are done\n", capsys.readouterr().err)
    assert run([*command, "--seed", "7"]) == 2
    assert "seed 0 (now 7)" in capsys.readouterr().err


def test_killed_process_goes_on_and_ends_bit_identical(data, tmp_path):
    command = ["train", "tokenizer", str(data), *SMALL, *PACE, "--epochs", "8", "--save-every", "5", "-q"]
    words = [sys.executable, "-m", "varcli", *command, "--out", str(tmp_path / "killed")]
    killed = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (tmp_path / "killed" / "state.safetensors").exists():
        time.sleep(0.01)
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with one_thread():
        for name in ("killed", "whole"):
            assert run([*command, "--out", str(tmp_path / name)]) == 0
    for name in ("tokenizer.safetensors", "state.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_dry_run_prints_the_plan_and_writes_nothing(data, tokenizer, tmp_path, capsys):
    out = tmp_path / "none"
    assert run(transformer_command(data, tokenizer, out, "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 5
    assert plan["recipe"]["base_lr"] == 0.05
    assert plan["expected_loss"] is None  # of this codebook the scaling laws know nothing
    assert run(transformer_command(data, tokenizer, out, "--dry-run")) == 0
    printed = capsys.readouterr()
    assert "expected loss" not in printed.out
    assert "--batch-size 4 --grad-accum 1 --base-lr 0.05 " in printed.out
    assert "24 images of 3 classes: 1 goldfish, 207 golden retriever, 281 tabby" in printed.err
    assert run(["train", "tokenizer", str(data), "--out", str(out), *SMALL, "--perceptual", "lpips", "--dry-run"]) == 0
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
        (["--perceptual", "lpips", "--lpips-weights", "nowhere"], 4, "or train with another --perceptual"),
        (["--perceptual", "resnet50", "--lpips-weights", "nowhere"], 4, "resnet50-11ad3fa6.pth are missing: put https"),
        (["--perceptual", "vgg"], 2, "--perceptual must be one of lpips, resnet50, efficientnet-lite0, none (got vgg)"),
        (["--init", "nobody"], 4, "there is no checkpoint nobody"),
        (["--freeze", "nothing.*"], 2, "--freeze nothing.* matches no weight; names are such as "),
        (["--freeze", "*"], 2, "--freeze * leaves no weight to train"),
        (["--freeze", "decoder.conv_out*"], 2, "--gan must be 0 where --freeze leaves out the decoder's last layer"),
        (["--device", "cuda:9"], 2, "no device cuda:9"),
        (["--sides", "1"], 2, "--gan must be 0 for images of fewer than 8 pixels per side"),
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
        ([*transformer_command(data, tokenizer, tmp_path / "a"), "--flex-attention", "--device", "cpu"], 2),
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


class Tracked:
    """Stands in for the package wandb: keeps what it is given."""

    class Error(Exception):
        pass

    def __init__(self):
        self.begun, self.logged = [], []

    def init(self, **settings):
        if settings["project"] == "locked":
            raise self.Error("nobody is logged in")
        self.begun.append(settings)
        return self

    def log(self, figures, step):
        self.logged.append((step, figures))


def test_wandb_gets_the_figures_and_the_same_run_again(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", tracked := Tracked())
    command = ["train", "tokenizer", str(data), "--out", str(tmp_path / "run"), *SMALL, *PACE, "--wandb", "cats", "-q"]
    assert run(command) == 0
    assert run([*command, "--epochs", "2"]) == 0
    first, again = tracked.begun
    assert first["project"] == "cats" and first["config"]["codebook_size"] == 32
    assert (first["id"], first["resume"]) == (again["id"], "allow")
    assert [step for step, _ in tracked.logged] == [5, 9]
    assert {"loss", "learning_rate", "validation/psnr", "codebook_perplexity_3"} <= tracked.logged[0][1].keys()
    command[command.index("cats")], command[command.index("--out") + 1] = "locked", str(tmp_path / "other")
    assert run(command) == 2
    assert "--wandb locked cannot begin: nobody is logged in; run `wandb login`" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(command) == 2
    assert "--wandb needs another package: pip install 'varcli[wandb]'" in capsys.readouterr().err


def test_what_shows_a_run_begins_where_it_goes_on_after_a_damaged_state(data, tmp_path, monkeypatch):
    command = ["train", "tokenizer", str(data), "--out", str(tmp_path), *SMALL, *PACE, "--save-every", "2", "-q"]
    assert run(command) == 0
    newest = tmp_path / "state.safetensors"  # of step 5; the one before it is of step 4
    newest.write_bytes(newest.read_bytes()[:-4] + b"gone")
    moved, purged = [], []

    @contextmanager
    def bar(*arguments):
        yield lambda count, text: moved.append(count)

    monkeypatch.setattr(watch, "progress", bar)
    monkeypatch.setattr(pipeline, "check_packages", lambda *arguments: None)
    monkeypatch.setattr(watch, "_tensorboard", lambda folder, first: lambda step, figures: purged.append(first))
    assert run([*command, "--tensorboard"]) == 0
    assert (moved, purged) == ([5], [5])


def test_a_terminal_shows_a_bar_and_lines_of_validations_only(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True
    command = ["train", "tokenizer", str(data), "--out", str(tmp_path), *SMALL, *PACE]
    assert run(command) == 0
    shown = terminal.getvalue()
    assert "5/5" in shown and "loss" in shown and "images/s" in shown
    assert shown.count("step 5/5: ") == 1


def test_copies_in_the_data_are_told(data, tmp_path, capsys):
    copied = shutil.copytree(data, tmp_path / "data")
    for i in range(6):
        shutil.copy(copied / "n01443537" / "n01443537_0.png", copied / "n02123045" / f"a{i}.png")
    command = ["train", "tokenizer", str(copied), "--out", str(tmp_path / "run"), *SMALL, *PACE]
    assert run(command) == 0
    assert "of the training images are exact duplicates of others; leave them out" in capsys.readouterr().err


def test_training_says_what_it_found_before_it_begins(data, tokenizer, tmp_path, capsys):
    everything = shutil.copytree(data, tmp_path / "data")
    (everything / "n01443537" / "x.HEIC").write_bytes(b"x")
    (everything / "n09999999").mkdir()
    assert run(transformer_command(everything, tokenizer, tmp_path / "run")) == 0
    told = capsys.readouterr().err.splitlines()
    assert told[4].startswith("var: step 1/5: loss ")
    assert told[:4] == [
        "var: data: 24 images of 3 classes: 1 goldfish, 207 golden retriever, 281 tabby",
        "var: data: left out: files named .heic (1): data/n01443537/x.HEIC",
        "var: data: data: class folders without images: n09999999",
        "var: only 5 steps to learn from: 1 epoch of 18 images in batches of 4; --batch-size 2 makes 9",
    ]


@pytest.mark.parametrize(
    ("epochs", "batch", "images", "told"),
    [
        (200, 768, 20, ("only 6 steps", "--batch-size 2 makes 2000")),
        (200, 768, 100, ("only 27 steps", "--batch-size 12 makes 1667")),
        (1, 4, 18, ("only 5 steps", "--batch-size 2 makes 9")),
        (10, 2, 20, ("only 100 steps", "--epochs 100 makes 1000")),
        (1, 64, 375, ("only 6 steps", "--epochs 10 makes 60")),
        (200, 768, 1_281_167, None),
        (200, 32, 1000, None),
    ],
)
def test_a_recipe_for_far_more_images_is_told(epochs, batch, images, told):
    notes = []
    pipeline._tell([], TrainingConfig(epochs=epochs, batch=batch), images, notes.append)
    assert len(notes) == bool(told)
    assert all(line.startswith(told[0]) and line.endswith(told[1]) for line in notes)


def test_a_single_image_is_told():
    notes = []
    pipeline._tell([], TrainingConfig(epochs=500, batch=1), 1, notes.append)
    assert notes == ["data: of a single image the model learns nothing but that image"]
    pipeline._tell([], TrainingConfig(epochs=1, batch=1), 1, notes.append)
    assert notes[2].startswith("only 1 step to learn from: 1 epoch of 1 image in batches of 1; ")


def test_a_loss_is_expected_only_where_the_scaling_laws_speak():
    def expected(**changes):
        shape = {"depth": 16, "width": 1024, "sides": GRID_256, "codebook_size": 4096, "codebook_width": 32}
        return expected_losses_at(TransformerConfig(**shape | changes))

    assert expected() == expected_losses(16)
    assert expected(depth=2) is None  # above chance
    assert expected(codebook_size=64) is None
    assert expected(sides=(1, 2, 4)) is None


def test_quiet_prints_nothing(data, tokenizer, tmp_path, capsys):
    assert run(transformer_command(data, tokenizer, tmp_path, "--quiet")) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("free", "writable", "workers", "count"),
    [
        (1 << 30, True, 4, 4),
        (30 << 20, True, 4, 1),
        (64 << 10, True, 4, 0),
        (1 << 30, False, 4, 0),
        (64 << 10, True, 0, 0),
    ],
)
def test_small_shared_memory_takes_fewer_workers(tmp_path, monkeypatch, free, writable, workers, count):
    notes = []
    monkeypatch.setattr(pipeline, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    assert pipeline._worker_count(workers, 10 << 20, notes.append) == count
    assert len(notes) == (count < workers)


def test_a_run_inside_its_data_goes_on(data, tokenizer, tmp_path, capsys):
    everything = shutil.copytree(data, tmp_path / "data")
    assert run(transformer_command(everything, tokenizer, everything / "run")) == 0
    assert run(transformer_command(everything, tokenizer, everything / "run")) == 0
    assert "left out: folders of training runs (1): data/run" in capsys.readouterr().err
    (everything / "n01443537" / "new.png").write_bytes((everything / "n01443537" / "n01443537_0.png").read_bytes())
    assert run(transformer_command(everything, tokenizer, everything / "run")) == 2
    assert "was begun with 18 images (now 19): n01443537 6 (now 7); use the same again" in capsys.readouterr().err
