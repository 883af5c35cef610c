"""Training: resumed runs end bit-identical, and every part of the recipe does what it says."""

import dataclasses
import errno
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from filelock import FileLock

from support.images import write_folder
from varcli.acceleration.dispatch import compile_networks
from varcli.checkpoints.safetensors_io import load_tensors, save_tensors
from varcli.checkpoints.store import load_model, load_tokenizer
from varcli.config import TokenizerConfig, TokenizerTrainingConfig, TransformerConfig, TransformerTrainingConfig
from varcli.distributed import ProcessGroup
from varcli.errors import CheckpointError, InputError, RunError, UsageError
from varcli.images.dataset import open_images
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.training import data as data_module
from varcli.training import optim
from varcli.training import tokenizer as tokenizer_training
from varcli.training import transformer as transformer_training
from varcli.training.data import CacheSettings, Crops, draws, loader, open_cache
from varcli.training.discriminator import PatchDiscriminator, augment
from varcli.training.estimate import estimate
from varcli.training.loop import Run, check_ranks, check_run, only_run, state_files, train, update
from varcli.training.metrics_log import MetricsLog
from varcli.training.optim import freeze, initialize_transformer
from varcli.training.parallel import Rows
from varcli.training.tokenizer import TokenizerStage, build_tokenizer
from varcli.training.transformer import TransformerStage, build_transformer, keep_block_inputs, tokens_at_once

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TOKENIZER = TokenizerConfig(
    sides=(1, 2, 4), codebook_size=32, codebook_width=8, base_width=32, multipliers=(1, 1), encoder_blocks=1
)
TOKENIZER_TRAINING = TokenizerTrainingConfig(
    batch=4, epochs=1, base_lr=0.06, perceptual="none", gan_start=0.5, scale_drop=0.3
)
TRANSFORMER = TransformerConfig(depth=2, width=64, sides=(1, 2, 4), codebook_size=32, codebook_width=8, class_count=2)
TRANSFORMER_TRAINING = TransformerTrainingConfig(batch=4, epochs=1, base_lr=0.06, accumulate=2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("data"), {"blue": 10, "red": 10})
    return open_images([folder], require_labels=True, read_headers=False)


def tokenizer_stage(images, **changes):
    training = dataclasses.replace(TOKENIZER_TRAINING, **changes)
    return TokenizerStage(*build_tokenizer(TOKENIZER, training.seed), training, *images.split(2), bf16=False)


def tokens(folder, images, **changes):
    torch.manual_seed(0)
    tokenizer = Tokenizer(TOKENIZER).eval()
    settings = dataclasses.replace(CacheSettings(enlarge=1.125, crops=1, seed=0), **changes)
    return tokenizer, open_cache(folder, tokenizer, images, settings, CPU)


def transformer_stage(folder, images, model=TRANSFORMER, **changes):
    tokenizer, cache = tokens(folder, images)
    training = dataclasses.replace(TRANSFORMER_TRAINING, **changes)
    model = build_transformer(model, training)
    return TransformerStage(model, training, tokenizer, images.classes, bf16=False, tokens=cache, held=cache)


def run(folder, steps=6, **changes):
    settings = {"identity": {"a": 1}, "save_every": 3, "log_every": 3}
    return Run(folder=folder, steps=steps, batch=4, **settings | changes)


class Killed(Exception):  # noqa: N818 (what happens, not what is wrong)
    pass


def kill_at(stage, step):
    """Make a stage die in the middle of a step, as if the process were gone."""
    apply = stage.apply_gradients

    def dying(number, steps):
        apply(number, steps)
        if number == step:
            raise Killed

    stage.apply_gradients = dying
    return stage


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_killed_and_resumed_ends_bit_identical(kind, tmp_path, images, monkeypatch):
    monkeypatch.setattr(tokenizer_training, "REVIVE_EVERY", 2)

    def stage():
        return tokenizer_stage(images) if kind == "tokenizer" else transformer_stage(tmp_path / "cache", images)

    train(stage(), run(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(kill_at(stage(), 4), run(tmp_path / "halved"))
    train(stage(), run(tmp_path / "halved"))
    whole, _ = load_tensors(tmp_path / "whole" / "state.safetensors")
    halved, metadata = load_tensors(tmp_path / "halved" / "state.safetensors")
    assert metadata["step"] == "6"
    assert whole.keys() == halved.keys()
    assert all(torch.equal(whole[name], halved[name]) for name in whole)
    file = "model.safetensors" if kind == "transformer" else "tokenizer.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "halved" / file).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "halved" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]


@pytest.mark.parametrize(
    ("number", "ended"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_saves_first(tmp_path, images, number, ended):
    stage, notes = tokenizer_stage(images), []
    stage.validate = pytest.fail  # a scheduler does not wait for it
    prepare = stage.prepare

    def interrupted(batch, step, steps):
        if step == 1:
            os.kill(os.getpid(), number)
        return prepare(batch, step, steps)

    stage.prepare = interrupted
    with pytest.raises(ended) as caught:
        train(stage, run(tmp_path, validate_every=2, note=notes.append))
    assert ended is KeyboardInterrupt or caught.value.code == 143
    assert notes == ["stopped after step 2 of 6, with the state saved; the same command resumes it"]
    assert load_tensors(tmp_path / "state.safetensors")[1]["step"] == "2"


def test_other_settings_are_refused(tmp_path, images):
    train(tokenizer_stage(images), run(tmp_path, steps=3))
    with pytest.raises(UsageError, match=r"a 1 \(now 2\)"):
        train(tokenizer_stage(images), run(tmp_path, identity={"a": 2}))


def test_activations_computed_again_change_no_bit_and_take_less_memory(tmp_path, images):
    deep = dataclasses.replace(TRANSFORMER, depth=24)  # stochastic depth drops a tenth in its last block
    stages = []
    for again in (False, True):
        stage = transformer_stage(tmp_path, images, model=deep)
        if again:
            keep_block_inputs(stage.model)
        for step, batch in enumerate(stage.batches(range(3))):
            update(stage, batch, step, 3)
        stages.append(stage)
    plain, again = (stage.model.state_dict() for stage in stages)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    plain, again = (estimate(stage, stage.training, 20).activation_bytes for stage in stages)
    assert again < plain / 3


@pytest.mark.parametrize("bf16", [False, True])
def test_logits_computed_part_by_part_change_rounding_only_and_take_less_memory(bf16, images):
    config, training = dataclasses.replace(TRANSFORMER, codebook_size=4096), TRANSFORMER_TRAINING
    torch.manual_seed(0)
    tokenizer = Tokenizer(dataclasses.replace(TOKENIZER, codebook_size=4096))
    tokens_BL, label_B = torch.randint(4096, (4, 21)), torch.tensor([0, 1, 2, 0])
    found = []
    for at_once in (None, 10):  # of 84 tokens, so that the last part is smaller
        stage = TransformerStage(build_transformer(config, training), training, tokenizer, images.classes, bf16=bf16)
        stage.at_once = at_once
        loss_BL, hit_BL = stage.predict(stage.model.eval(), tokens_BL, label_B)
        loss_BL[:, 5:].square().mean().backward()
        gradients = [weight.grad for weight in stage.model.parameters()]
        found.append([loss_BL, hit_BL, *gradients, estimate(stage, training, 20).activation_bytes])
    (*plain, kept), (*again, kept_again) = found
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03 if bf16 else 1e-4, atol=1e-3 if bf16 else 1e-6)
    assert kept_again < kept / 2


def test_logits_that_would_fill_memory_are_computed_part_by_part(monkeypatch):
    monkeypatch.setattr(transformer_training, "memory_bytes", lambda device: 32 * 4 * 32 * 100)
    assert tokens_at_once(4, TRANSFORMER, CPU) is None  # 84 of the 100 tokens that a 32nd of the memory holds
    assert tokens_at_once(5, TRANSFORMER, CPU) == 100
    monkeypatch.setattr(transformer_training, "memory_bytes", lambda device: None)
    assert tokens_at_once(10**9, TRANSFORMER, CPU) is None


def test_a_tokens_loss_weighs_one_over_its_side_where_asked(tmp_path, images):
    plain, sided = (transformer_stage(tmp_path, images, scale_weight=rule) for rule in ("mean", "side"))
    tokens_BL, label_B = plain.tokens.batch([(0, 0), (1, 0)])
    loss_BL, _ = plain.predict(plain.model.eval(), tokens_BL, label_B)
    one, two, four = loss_BL.split([1, 4, 16], dim=1)
    by_hand = (one.sum() + two.sum() / 2 + four.sum() / 4) / (2 * (1 + 4 / 2 + 16 / 4))
    assert (loss_BL * sided.weight_L).mean().item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert torch.equal(plain.weight_L, torch.ones(21))


def test_a_shortened_step_does_not_look_at_the_last_scale(tmp_path, images):
    last = slice(1 + 4, None)
    weights = []
    for change in (0, 1):
        stage = transformer_stage(tmp_path, images, scale_drop=1.0)
        (tokens_BL, label_B), *_ = stage.batches(range(1))
        tokens_BL = tokens_BL.clone()
        tokens_BL[:, last] = (tokens_BL[:, last] + change) % stage.config.codebook_size
        figures = update(stage, (tokens_BL, label_B), 0, 3)
        weights.append(stage.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert {"loss", "loss_scale_1", "loss_scale_2"} <= figures.keys()
    assert not {"loss_last", "loss_scale_3"} & figures.keys()
    # the coarse scales do not see the last one, so their losses are those of a whole step
    stage = transformer_stage(tmp_path, images)
    whole = update(stage, (tokens_BL, label_B), 0, 3)
    assert whole["loss_scale_2"].item() == pytest.approx(figures["loss_scale_2"].item(), rel=1e-5)
    assert {"loss_last", "loss_scale_3"} <= whole.keys()


def test_shortened_steps_leave_the_last_scales_figures_to_the_others(tmp_path, images):
    stage = transformer_stage(tmp_path / "cache", images, scale_drop=0.5)
    lengths = []
    prepare = stage.prepare

    def noting(batch, step, steps):
        parts = prepare(batch, step, steps)
        lengths.append(parts[0][0].shape[1])
        return parts

    stage.prepare = noting
    figures = train(stage, run(tmp_path, steps=12, log_every=12))
    assert 0 < lengths.count(5) < 12
    assert figures["loss_last"] == pytest.approx(figures["loss_scale_3"])
    assert math.isfinite(figures["loss_last"])
    assert figures["validation_loss_last"] > 0


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_a_checkpoint_without_its_state_is_not_replaced(kind, tmp_path, images):
    stage = tokenizer_stage(images) if kind == "tokenizer" else transformer_stage(tmp_path / "cache", images)
    train(stage, run(tmp_path))
    for file in state_files(tmp_path):
        file.unlink()
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    with pytest.raises(UsageError, match=r"has a (tokenizer|model)\.safetensors and no state .*; use another --out"):
        train(stage, run(tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == kept


def test_no_checkpoint_is_there_before_the_state(tmp_path, images):
    stage = tokenizer_stage(images)

    def killed(*arguments):
        raise Killed

    stage.save = killed
    with pytest.raises(Killed):
        train(stage, run(tmp_path, validate_every=1, save_every=100))
    assert train(tokenizer_stage(images), run(tmp_path, validate_every=1, save_every=100))["step"] == 6


def test_a_run_killed_before_its_first_state_begins_anew(tmp_path, images):
    with pytest.raises(Killed):
        train(kill_at(tokenizer_stage(images), 1), run(tmp_path, log_every=1))
    assert (tmp_path / "metrics.jsonl").exists()
    assert train(tokenizer_stage(images), run(tmp_path))["step"] == 6


def test_a_finished_run_goes_on_for_more_epochs(tmp_path, images):
    train(tokenizer_stage(images), run(tmp_path, 3, identity={"a": 1, "epochs": 1.0}))
    notes = []
    last = train(tokenizer_stage(images), run(tmp_path, 6, identity={"a": 1, "epochs": 2.0}, note=notes.append))
    assert last["step"] == 6
    assert notes == ["resuming at step 3, with the learning rates of 2 epochs instead of 1"]
    with pytest.raises(UsageError, match=r"has come to step 6, and --epochs 1 ends at step 3; give more --epochs"):
        train(tokenizer_stage(images), run(tmp_path, 3, identity={"a": 1, "epochs": 1.0}))
    with pytest.raises(UsageError, match=r"begun with --a 1 \(now 2\), --epochs 2\.0 \(now 3\.0\)"):
        train(tokenizer_stage(images), run(tmp_path, 9, identity={"a": 2, "epochs": 3.0}))


def test_a_run_under_way_takes_fewer_epochs(tmp_path, images):
    """It goes on by the learning rates of the shorter run, so it ends as small as any."""
    with pytest.raises(Killed):
        train(kill_at(tokenizer_stage(images), 3), run(tmp_path, 9, identity={"a": 1, "epochs": 3.0}, save_every=1))
    notes = []
    steps = []
    shorter = tokenizer_stage(images)
    apply = shorter.apply_gradients
    shorter.apply_gradients = lambda step, of: (steps.append((step, of)), apply(step, of))
    assert train(shorter, run(tmp_path, 6, identity={"a": 1, "epochs": 2.0}, note=notes.append))["step"] == 6
    assert notes == ["resuming at step 3, with the learning rates of 2 epochs instead of 3"]
    assert steps == [(3, 6), (4, 6), (5, 6)]


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"a": 2, "b": 3}, "5 images (now 5), of which some had other names or sizes"),
        ({"a": 2, "b": 4}, "5 images (now 6): b 3 (now 4)"),
        ({"a": 2, "c": 1}, "5 images (now 3): b 3 (now 0), c 0 (now 1)"),
    ],
)
def test_other_images_are_told_by_their_numbers(tmp_path, images, now, words):
    train(tokenizer_stage(images), run(tmp_path, 1, identity={"pictures": "x"}, images={"a": 2, "b": 3}))
    with pytest.raises(UsageError) as caught:
        check_run(run(tmp_path, 1, identity={"pictures": "y"}, images=now))
    assert f"was begun with {words}; use the same again" in str(caught.value)


@pytest.fixture(scope="module")
def begun(tmp_path_factory, images):
    """The folder of a run after three steps."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(tokenizer_stage(images), run(folder, 3))
    return folder


def rewritten(path, change):
    tensors, metadata = load_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    del metadata["sha256"]  # as in states of earlier versions
    change(tensors, metadata)
    save_tensors(path, tensors, metadata)


DAMAGE = {
    "no identity": lambda tensors, metadata: metadata.pop("identity"),
    "identity of another kind": lambda tensors, metadata: metadata.update(identity="5"),
    "deep identity": lambda tensors, metadata: metadata.update(identity="[" * 100_000),
    "no step": lambda tensors, metadata: metadata.pop("step"),
    "step x": lambda tensors, metadata: metadata.update(step="x"),
    "a tensor less": lambda tensors, metadata: tensors.popitem(),
    "a weight less": lambda tensors, metadata: tensors.pop("model.quant_conv.weight"),
    "another shape": lambda tensors, metadata: tensors.update({"model.quant_conv.weight": torch.zeros(3)}),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_damaged_states_are_one_line(tmp_path, images, begun, change):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    (tmp_path / "state-previous.safetensors").unlink()
    rewritten(tmp_path / "state.safetensors", change)
    with pytest.raises(CheckpointError, match=r"the state .*state\.safetensors is damaged: ") as caught:
        train(tokenizer_stage(images), run(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def killed_and_whole(tmp_path_factory, images):
    """The folders of a run that was killed in its eighth step, and of the same run of nine steps."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(Killed):
        train(kill_at(tokenizer_stage(images, gan=0.0), 7), run(folder / "killed", 9))
    train(tokenizer_stage(images, gan=0.0), run(folder / "whole", 9))
    return folder / "killed", folder / "whole"


@pytest.mark.parametrize("damage", ["truncated", "a bit", "a tensor less", "away"])
def test_a_damaged_state_falls_back_to_the_one_before_it(tmp_path, images, killed_and_whole, damage):
    killed, whole = killed_and_whole
    shutil.copytree(killed, tmp_path / "run")
    state = tmp_path / "run" / "state.safetensors"
    content = bytearray(state.read_bytes())
    if damage == "truncated":
        state.write_bytes(content[:-1])
    elif damage == "a bit":
        content[-1000] ^= 1
        state.write_bytes(content)
    elif damage == "a tensor less":
        rewritten(state, DAMAGE[damage])
    else:
        state.unlink()  # as a kill leaves it, while a new one is written
    notes = []
    train(tokenizer_stage(images, gan=0.0), run(tmp_path / "run", 9, note=notes.append))
    told = [] if damage == "away" else [f"{state} is damaged; resuming from the state before it, at step 3"]
    assert notes == told
    for name in ("state.safetensors", "state-previous.safetensors", "tokenizer.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("line", [b"", b"5", b"{}", b'{"step": "x"}', b"\xff", b"[" * 100_000, b'{"step": 2'])
def test_damaged_lines_of_the_log_are_dropped(tmp_path, begun, line):
    good = (begun / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n" + good + line)
    assert MetricsLog(tmp_path, 3, 4).last["step"] == 3
    assert (tmp_path / "metrics.jsonl").read_bytes() == good


@pytest.mark.parametrize(
    "content", ["", "5", "{}", '{"done": "x", "unreadable": []}', '{"done": 1e9, "unreadable": []}']
)
def test_a_damaged_cache_is_computed_anew(tmp_path, images, content):
    _, cache = tokens(tmp_path, images)
    (progress,) = tmp_path.glob("tokens-*/progress.json")
    (progress.parent / "tokens.npy").write_bytes((progress.parent / "tokens.npy").read_bytes()[:-8] + bytes(8))
    progress.write_text(content)
    _, again = tokens(tmp_path, images)
    assert np.array_equal(again.tokens, cache.tokens)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_file_systems_without_locks_are_one_line(tmp_path, images, monkeypatch, error):
    def refuse(self, *arguments, **options):
        (tmp_path / "lock").touch()
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(RunError, match=r"cannot be locked \(.*\): choose a folder on another file system"):
        train(tokenizer_stage(images), run(tmp_path))
    assert not (tmp_path / "lock").exists()


class Ending:
    """Images whose reader ends in the middle."""

    def __init__(self, end):
        self.end = end

    def __len__(self):
        return 4

    def read(self, index):
        self.end()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def full():
    raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")


def wrong():
    raise RuntimeError("a mistake of ours")


@pytest.mark.parametrize("end", [killed, full])
def test_a_reader_that_the_system_ends_is_one_line(end):
    with pytest.raises(RunError, match=r"a data-loading worker failed: .*; try --workers 0") as caught:
        next(loader(Crops(Ending(end), 8, 1.0, None), [[(0, 0)]], 1))
    assert "\n" not in str(caught.value)


def test_a_reader_that_is_ended_while_a_step_is_computed_is_one_line(tmp_path, images):
    stage = tokenizer_stage(images)
    stage.workers = 1
    before = set(multiprocessing.active_children())

    def computing(step, steps):
        for reader in set(multiprocessing.active_children()) - before:
            reader.kill()
        for _ in range(300):  # a signal that arrives just before one long sleep would not end it
            time.sleep(0.1)

    stage.apply_gradients = computing
    with pytest.raises(RunError, match=r"^a data-loading worker failed: .* is killed by signal: Killed") as caught:
        train(stage, run(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_error_that_nobody_catches_ends_the_process_and_its_readers(tmp_path):
    """Its traceback keeps the loader, whose readers ignore the SIGTERM by which Python ends them at its exit."""
    write_folder(tmp_path, {"n02099601": 4})
    code = f"""
from pathlib import Path
from varcli.images.dataset import open_images
from varcli.training.data import Crops, loader

images = open_images([Path({str(tmp_path)!r})], require_labels=True, read_headers=False)
batches = loader(Crops(images, 8, 1.0, None), [[(0, 0)]] * 50, 2)
next(batches)
raise SystemError("a mistake elsewhere")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "SystemError: a mistake elsewhere"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_reader_that_just_begins_does_not_end_it(monkeypatch, images, number):
    """Schedulers and terminals send it to all processes; the main one saves and ends the others."""
    ignore = data_module._follow_parent

    def signalled(worker):
        os.kill(os.getpid(), number)
        ignore(worker)

    monkeypatch.setattr(data_module, "_follow_parent", signalled)
    (batch,) = loader(Crops(images, 8, 1.0, None), [[(0, 0)]], 1)
    assert batch[0].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_a_reader_is_shown_whole(workers):
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        next(loader(Crops(Ending(wrong), 8, 1.0, None), [[(0, 0)]], workers))


def test_non_finite_loss_keeps_the_last_good_checkpoint(tmp_path, images):
    stage = tokenizer_stage(images)
    prepare = stage.prepare

    def poisoned(batch, number, steps):
        if number == 4:
            with torch.no_grad():
                stage.model.decoder.conv_out.bias.fill_(math.nan)
        return prepare(batch, number, steps)

    stage.prepare = poisoned
    with pytest.raises(RunError, match="at step 5"):
        train(stage, run(tmp_path))
    tensors, metadata = load_tensors(tmp_path / "state.safetensors")
    assert metadata["step"] == "3"
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_a_full_disk_keeps_the_last_state(tmp_path, images, monkeypatch):
    stage = tokenizer_stage(images)
    prepare = stage.prepare

    def filling(batch, number, steps):
        if number == 3:
            monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return prepare(batch, number, steps)

    stage.prepare = filling
    with pytest.raises(RunError, match=r"tokenizer\.safetensors cannot be written: No space left on device"):
        train(stage, run(tmp_path, log_every=100))
    monkeypatch.undo()
    assert load_tensors(tmp_path / "state.safetensors")[1]["step"] == "3"
    assert not list(tmp_path.glob(".varcli*"))
    assert train(tokenizer_stage(images), run(tmp_path))["step"] == 6


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 2048)])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_that_vanishes_or_is_cut_off_ends_the_run(damage, workers, tmp_path):
    folder = write_folder(tmp_path / "data", {"blue": 10, "red": 10})
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(folder, ".")
    images = open_images([tmp_path / "train.tar"], require_labels=True, read_headers=False)
    models = build_tokenizer(TOKENIZER, 0)
    stage = TokenizerStage(*models, TOKENIZER_TRAINING, images, images.subset([]), bf16=False, workers=workers)
    prepare = stage.prepare

    def damaging(batch, number, steps):
        if number == 3:
            damage(tmp_path / "train.tar")
        return prepare(batch, number, steps)

    stage.prepare = damaging
    line = r"^none of the 20 images of the data can be read; the first is train\.tar/[^\n]*$"
    with pytest.raises(InputError, match=line):
        train(stage, run(tmp_path / "run", steps=50))
    assert (tmp_path / "run" / "state.safetensors").exists()


def test_non_finite_gradient_changes_no_weight(images):
    stage = tokenizer_stage(images)
    stage.model.decoder.conv_out.bias.register_hook(lambda gradient: gradient * math.nan)
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items() if "ema" not in name}
    metrics = update(stage, next(stage.batches(range(1))), 1, 10)
    assert not metrics["loss"].isfinite()
    assert all(torch.equal(before[name], stage.model.state_dict()[name]) for name in before)


def test_two_runs_in_one_folder_are_refused(tmp_path, images):
    with only_run(tmp_path), pytest.raises(RunError, match="another run is using"):
        train(tokenizer_stage(images), run(tmp_path))


def test_memory_that_does_not_suffice_is_one_line(tmp_path, images):
    stage = tokenizer_stage(images)

    def starving(batch, number, steps):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30 GiB.")

    stage.prepare = starving
    with pytest.raises(RunError, match="a batch of 4 does not fit"):
        train(stage, run(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [("base_lr", 0.01), ("final_lr", 0.9), ("weight_decay", 0.5), ("final_weight_decay", 0.5), ("gamma_init", 0.1),
     ("seed", 1), ("ema", 0.1)],
)  # fmt: skip
def test_every_transformer_option_changes_the_result(name, value, tmp_path, images):
    ends = []
    for changes in ({}, {name: value}):
        stage = transformer_stage(tmp_path, images, **changes)
        for step, batch in enumerate(stage.batches(range(4))):
            update(stage, batch, step, 4)
        ends.append(stage.average.model.blocks[0].ffn.fc1.weight)
    assert not torch.equal(*ends)


def test_tokenizer_learns_and_its_file_loads(tmp_path, images):
    stage = tokenizer_stage(images, gan=0.0, scale_drop=0.0, ema=0.5, base_lr=0.2)
    before = stage.validate()["psnr"]
    train(stage, run(tmp_path, steps=60, log_every=20))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["validation_psnr"] > before + 3
    assert set(lines[-1]) > {f"validation_codebook_usage_{k}" for k in (1, 2, 3)}
    assert load_tokenizer(tmp_path / "tokenizer.safetensors").config == TOKENIZER


def test_transformer_learns_classes_and_its_file_loads(tmp_path, images):
    stage = transformer_stage(tmp_path, images, ema=0.5)
    first = stage.validate()
    assert first["loss"] == pytest.approx(math.log(32), abs=0.2)
    train(stage, run(tmp_path / "run", steps=40))
    last = stage.validate()
    assert last["loss"] < first["loss"] - 0.5
    checkpoint = load_model(tmp_path / "run" / "model.safetensors")
    assert checkpoint.transformer.config == TRANSFORMER
    assert [entry.name for entry in checkpoint.classes.entries] == ["blue", "red"]


class RankOfTwo(ProcessGroup):
    """Gathers, for the main rank, what the other one had before."""

    sent: ClassVar[list] = []

    def gather(self, item):
        self.sent.append(item)
        return self.sent[::-1] if self.is_main else []


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_ranks_share_the_validation(kind, tmp_path, images, monkeypatch):
    for module in (tokenizer_training, transformer_training):
        monkeypatch.setattr(module, "VALIDATION_BATCH", 3)
    monkeypatch.setattr(RankOfTwo, "sent", [])
    stage = tokenizer_stage(images) if kind == "tokenizer" else transformer_stage(tmp_path, images)
    alone = stage.validate()
    stage.group = RankOfTwo(rank=1, world_size=2)
    assert stage.validate() == {}
    stage.group = RankOfTwo(rank=0, world_size=2)
    assert stage.validate() == pytest.approx(alone, rel=1e-5)
    assert len(stage.group.sent) == 2


def test_ranks_that_do_not_share_the_runs_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ProcessGroup, "gather", lambda self, own: [own, (*own[:2], 0)])
    with pytest.raises(InputError, match=r"resumes .* at step 3, and rank 1 at step 0; --out must be a folder that"):
        check_ranks(run(tmp_path), 3, ProcessGroup())


def test_nothing_is_validated_without_held_out_images(images):
    model = build_tokenizer(TOKENIZER, TOKENIZER_TRAINING.seed)
    assert TokenizerStage(*model, TOKENIZER_TRAINING, *images.split(0), bf16=False).validate() == {}


def test_validation_drops_no_labels(tmp_path, images):
    stage = transformer_stage(tmp_path, images)
    with torch.no_grad():
        for parameter in stage.average.model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert stage.validate() == stage.validate()


def test_labels_are_dropped_a_tenth_of_the_time(tmp_path, images):
    torch.manual_seed(1)
    dropped = transformer_stage(tmp_path, images).model.drop_labels(torch.zeros(20_000, dtype=torch.int64))
    assert float((dropped == 2).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_accumulation_changes_rounding_only(tmp_path, images):
    at_once = tokenizer_stage(images, gan=0.0, scale_drop=0.0)
    in_parts = tokenizer_stage(images, gan=0.0, scale_drop=0.0, accumulate=2)
    batch = next(at_once.batches(range(1)))
    norms = [float(update(stage, batch, 1, 10)["gradient_norm"]) for stage in (at_once, in_parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    after = [stage.model.quant_conv.bias.detach() for stage in (at_once, in_parts)]
    assert torch.allclose(*after, atol=2e-5)


def edges(made, image):
    """A perceptual loss whose gradient is not that of the squared error."""
    return (made.diff(dim=2) - image.diff(dim=2)).abs().mean()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
@pytest.mark.parametrize(
    ("compiled", "frozen", "gan"),
    [(False, "", 0.3), (True, "", 0.3), (False, "encoder.*,quant*", 0.3), (False, "decoder.*,quantize.*", 0.0)],
)
def test_a_tokenizers_gradient_is_that_of_equation_5(compiled, frozen, gan, images):
    stage, plain = (tokenizer_stage(images, scale_drop=0.0, gan=gan, perceptual_weight=0.7) for _ in range(2))
    batch = next(stage.batches(range(1)))
    for one in (stage, plain):
        one.perceptual = edges
        freeze(one.model, frozen)
        torch.manual_seed(0)
        (part,) = one.prepare(batch, 0, 1)
    if compiled:
        compile_networks(stage.model, CPU)
    for one in (stage, plain):
        one.adversarial = gan > 0
    rows = Rows(0, len(part), len(part))
    torch.manual_seed(1)
    found = stage.add_gradients(part, rows, last=True)

    torch.manual_seed(1)
    image = part / 127.5 - 1
    decoded, quantization, _, _ = plain.reconstruct(image, None)
    pull = (decoded - image).square().mean() + 0.7 * edges(decoded, image)
    loss = pull + quantization
    if gan:
        push = -plain.discriminator(augment(decoded)).mean()
        last = plain.model.decoder.conv_out.weight
        norms = [torch.autograd.grad(one, last, retain_graph=True)[0].norm() for one in (pull, push)]
        loss = loss + gan * norms[0] / (norms[1] + 1e-4) * push
    loss.backward()
    assert float(found["loss"].detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    for parameter, other in zip(stage.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gan", 0.0),
        ("gan_start", 0.0),
        ("scale_drop", 1.0),
        ("base_lr", 0.01),
        ("weight_decay", 0.5),
        ("seed", 1),
        ("enlarge", 1.0),
        ("final_lr", 0.9),
    ],
)
def test_every_tokenizer_option_changes_the_result(name, value, images):
    ends = []
    for changes in ({}, {name: value}):
        stage = tokenizer_stage(images, **changes)
        for step, batch in enumerate(stage.batches(range(4))):
            update(stage, batch, step, 4)
        ends.append(stage.model.decoder.conv_out.weight)
    assert not torch.equal(*ends)


def test_dead_codes_are_revived(images):
    stage = tokenizer_stage(images, gan=0.0)
    batch = next(stage.batches(range(1)))
    update(stage, batch, 0, 1000)
    weight = stage.model.quantize.embedding.weight
    with torch.no_grad():
        weight[:16] = 1e3
        stage.model.quantize.ema_vocab_hit_SV[:, 16:] = 1.0
        stage.model.quantize.ema_vocab_hit_SV[:, :16] = 0.0
    update(stage, batch, 99, 1000)
    assert float(weight[:16].detach().abs().max()) < 10
    assert float(stage.optimizer.state[weight]["exp_avg"][:16].abs().max()) == 0


def test_order_is_a_permutation_each_epoch_and_resumes_anywhere():
    whole = list(draws(10, 4, range(5), seed=3))
    assert sorted(index for index, epoch in itertools.chain(*whole) if epoch == 0) == list(range(10))
    assert list(draws(10, 4, range(3, 5), seed=3)) == whole[3:]
    assert whole != list(draws(10, 4, range(5), seed=4))


def test_one_unreadable_image_is_replaced_and_many_stop_the_run(tmp_path, images):
    folder = write_folder(tmp_path / "data", {"a": 2, "b": 2})
    (folder / "a" / "a_0.png").write_bytes(b"no image")
    broken = open_images([folder], require_labels=True, read_headers=False)
    crops = Crops(broken, 8, 1.0, None)
    pixels, names = next(loader(crops, [[(0, 0), (1, 0)]], 0))
    assert torch.equal(pixels[0], pixels[1])
    assert [len(n) for n in names] == [1, 0]
    assert names[0][0][0].endswith("a/a_0.png")
    models = build_tokenizer(TOKENIZER, TOKENIZER_TRAINING.seed)
    stage = TokenizerStage(*models, TOKENIZER_TRAINING, broken, broken.subset([]), bf16=False)
    with pytest.raises(InputError, match=r"1 of 4 images are unreadable, .*a_0\.png \(not an image"):
        train(stage, run(tmp_path / "run"))


def test_cache_holds_what_the_tokenizer_says_and_resumes(tmp_path, images, monkeypatch):
    tokenizer, cache = tokens(tmp_path / "one", images)
    crop = Crops(images, 8, 1.125, None).crop(3, 0)[None]
    expected = torch.cat(tokenizer.encode(crop / 127.5 - 1), 1)
    taken, rows = cache.batch([(3, 0)])
    assert torch.equal(taken, expected)
    assert rows.tolist() == [images.labels[3]]

    import varcli.training.data as module

    monkeypatch.setattr(module, "ENCODE_BATCH", 4)
    monkeypatch.setattr(module, "FLUSH_EVERY", 2)
    encode, calls = module._encode, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return encode(*arguments)

    monkeypatch.setattr(module, "_encode", dying)
    with pytest.raises(Killed):
        tokens(tmp_path / "two", images)
    _, resumed = tokens(tmp_path / "two", images)
    assert len(calls) == 4 + 3  # two of five batches were on disk
    assert np.array_equal(resumed.tokens, cache.tokens)
    _, again = tokens(tmp_path / "two", images)
    assert len(calls) == 7
    assert np.array_equal(again.tokens, cache.tokens)
    assert not again.tokens.flags.writeable  # a whole cache may be in a folder that cannot be written


def test_a_begun_cache_that_cannot_be_written_is_one_line(tmp_path, images, monkeypatch):
    tokens(tmp_path, images)
    progress = next(tmp_path.glob("*/progress.json"))
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"done": 8}))
    whole = data_module.open_memmap

    def refusing(path, mode):
        if mode == "r+":
            raise PermissionError(errno.EACCES, "Permission denied")
        return whole(path, mode=mode)

    monkeypatch.setattr(data_module, "open_memmap", refusing)
    with pytest.raises(RunError, match=r"tokens-\w+ cannot be written.*Permission denied"):
        tokens(tmp_path, images)


def test_a_cache_that_cannot_be_read_is_one_line_and_kept(tmp_path, images):
    tokens(tmp_path, images)
    progress = next(tmp_path.glob("*/progress.json"))
    progress.unlink()
    progress.mkdir()
    before = (progress.parent / "tokens.npy").read_bytes()
    with pytest.raises(InputError, match=r"the cache of token maps .*tokens-\w+ cannot be read: Is a directory"):
        tokens(tmp_path, images)
    assert (progress.parent / "tokens.npy").read_bytes() == before


def test_cached_crops_differ_and_epochs_take_turns(tmp_path, images):
    _, cache = tokens(tmp_path, images, crops=2, enlarge=2.0)
    first, second, third = (cache.batch([(i, epoch) for i in range(20)])[0] for epoch in (0, 1, 2))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_average_follows_the_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    average = optim.MovingAverage(model, 0.5)
    start = float(model.weight.detach())
    with torch.no_grad():
        model.weight.add_(1)
    average.update(model, step=100)
    assert float(average.model.weight) == pytest.approx(start + 0.5)


def test_the_fused_optimizer_is_the_plain_one_to_rounding(tmp_path, images):
    fused, plain = (transformer_stage(tmp_path, images) for _ in range(2))
    groups = [{"params": group["params"]} for group in plain.optimizer.param_groups]
    plain.optimizer = torch.optim.AdamW(groups, betas=transformer_training.BETAS, foreach=False, fused=False)
    for stage in (fused, plain):
        for step, batch in enumerate(stage.batches(range(5))):
            update(stage, batch, step, 5)
    for one, other in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_weight_decay_spares_what_the_recipe_spares(tmp_path, images):
    stage = transformer_stage(tmp_path, images)
    names = {id(parameter): name for name, parameter in stage.model.named_parameters()}
    decayed = {names[id(p)] for p in stage.optimizer.param_groups[0]["params"]}
    assert "blocks.0.attn.mat_qkv.weight" in decayed
    assert "class_emb.weight" in decayed
    spared = set(names.values()) - decayed
    assert {"pos_start", "pos_1LC", "lvl_embed.weight", "blocks.0.attn.scale_mul_1H11", "head.bias"} <= spared


def test_initialization_is_the_recipe():
    torch.manual_seed(0)
    config = dataclasses.replace(TRANSFORMER, width=256, depth=4)
    model = Transformer(config)
    initialize_transformer(model, gamma=1e-3)
    model.requires_grad_(False)
    std = math.sqrt(1 / (3 * 256))
    block = model.blocks[1]
    assert float(block.attn.mat_qkv.weight.std()) == pytest.approx(std, rel=0.03)
    assert float(block.attn.proj.weight.std()) == pytest.approx(std / math.sqrt(8), rel=0.03)
    assert float(block.ffn.fc2.weight.std()) == pytest.approx(std / math.sqrt(8), rel=0.03)
    assert float(model.head.weight.std()) == pytest.approx(0.02 * std, rel=0.03)
    assert float(block.ada_lin[1].weight[:512].std()) == pytest.approx(1e-3 * std, rel=0.03)
    assert float(block.ada_lin[1].weight[512:].std()) == pytest.approx(0.5 * std, rel=0.03)
    assert float(model.head_nm.ada_lin[1].weight.std()) == pytest.approx(0.5 * std, rel=0.03)
    assert float(block.ada_lin[1].bias.abs().max()) == 0


def test_initialization_with_shared_modulation_is_the_recipe():
    torch.manual_seed(0)
    config = dataclasses.replace(TRANSFORMER, width=512, depth=4, shared_adaln=True)
    model = Transformer(config).requires_grad_(False)
    initialize_transformer(model, gamma=1e-3)
    std = math.sqrt(1 / (3 * 512))
    gates, rest = model.blocks[1].ada_gss[:, :, :2], model.blocks[1].ada_gss[:, :, 2:]
    assert float(gates.std()) == pytest.approx(1e-3 / math.sqrt(512), rel=0.1)
    assert float(rest.std()) == pytest.approx(0.5 / math.sqrt(512), rel=0.1)
    assert float(model.shared_ada_lin.linear.weight.std()) == pytest.approx(std, rel=0.03)


def test_schedules_have_the_recipe_shape():
    rate = [optim.linear_factor(step, 1000, 0.1) for step in range(1000)]
    assert rate[0] == pytest.approx(0.005)
    assert rate[10] == pytest.approx((0.005 + 1) / 2)
    assert rate[20] == rate[60] == 1
    assert rate[-1] == pytest.approx(0.1)
    middle = (509 - 20) / (999 - 20)
    assert rate[509] == pytest.approx(0.1 + 0.9 * (1 - middle) / 0.95)
    cosine = [optim.cosine_factor(step, 1000, 0.3) for step in range(1000)]
    assert max(cosine) == 1
    assert cosine[-1] == pytest.approx(0.3)
    assert optim.weight_decay(0, 100, 0.05, 0.08) == 0.05
    assert optim.weight_decay(99, 100, 0.05, 0.08) == pytest.approx(0.08)


def test_augmentation_is_differentiable_and_random():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 16, 16, requires_grad=True)
    first, second = augment(image), augment(image)
    assert first.shape == image.shape
    assert not torch.equal(first, second)
    PatchDiscriminator(8)(first).sum().backward()
    assert float(image.grad.abs().sum()) > 0
