"""Several ranks train as one does: only rounding differs, and a run goes on with another number of them."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch

from support.fork_server import python
from support.images import write_folder
from support.threads import one_thread
from varcli.checkpoints.safetensors_io import load_tensors
from varcli.cli import run
from varcli.distributed import ProcessGroup
from varcli.errors import UsageError
from varcli.models.transformer import StochasticDepth
from varcli.training.data import draws
from varcli.training.discriminator import augment
from varcli.training.parallel import Rows, check_batch, rows_of_part, share_rows

SHAPE = "--sides 1,2,4 --base-width 32 --multipliers 1,1 --encoder-blocks 1 --codebook-size 32 --codebook-width 8"
PACE = "--batch-size 8 --holdout 2 --device cpu --workers 0 --base-lr 0.05 --json"
TOKENIZER = f"{SHAPE} {PACE} --dtype fp32 --perceptual none --scale-drop 0.5 --gan 0.4 --gan-start 0".split()
TRANSFORMER = f"{PACE} --dtype fp32 --depth 6 --width 64".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), {"n02099601": 14, "n01443537": 14})


def command(stage, data, out, *more):
    words = [sys.executable, "-m", "varcli", "train", stage, str(data), "--out", str(out)]
    return [*words, *(TOKENIZER if stage == "tokenizer" else TRANSFORMER), *map(str, more)]


@pytest.fixture(scope="module", autouse=True)
def as_the_ranks_do():
    """Runs of one process compute with as many threads as the ranks."""
    with one_thread():
        yield


def train(stage, data, out, *more):
    """Train, in this process where one is enough, and return the last figures."""
    words = command(stage, data, out, *more)
    if "--nproc" not in more:
        with redirect_stdout(StringIO()) as printed:
            assert run(words[3:]) == 0
        return json.loads(printed.getvalue())
    words[0] = python()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def tokenizer(data, as_the_ranks_do, tmp_path_factory):
    """The option with a tokenizer for transformers."""
    out = tmp_path_factory.mktemp("tokenizer")
    train("tokenizer", data, out, "--epochs", 0.3)
    return ("--tokenizer", out / "tokenizer.safetensors")


@pytest.fixture(scope="module")
def alone(data, tokenizer, tmp_path_factory):
    """A transformer's run of one process: its folder and last figures."""
    out = tmp_path_factory.mktemp("alone")
    return out, train("transformer", data, out, *tokenizer, "--epochs", 2)


# --- parts of a batch ------------------------------------------------------------------------------


def test_ranks_share_each_batch_in_order():
    whole = list(draws(10, 6, range(4), seed=3))
    parts = [list(draws(10, 6, range(4), 3, ProcessGroup(rank, 3))) for rank in range(3)]
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == whole
    rows = [rows_of_part(24, 2, part, ProcessGroup(rank, 3)) for rank in range(3) for part in range(2)]
    assert [(each.first, each.count, each.total) for each in rows] == [(i * 4, 4, 24) for i in range(6)]


def test_a_batch_that_does_not_come_out_even_is_refused():
    check_batch(24, 2, ProcessGroup(0, 3))
    with pytest.raises(
        UsageError, match=r"--batch-size must be a multiple of 3 processes times --grad-accum 2 \(got 8\)"
    ):
        check_batch(8, 2, ProcessGroup(0, 3))


def test_what_is_drawn_for_a_part_is_the_whole_batchs():
    images = torch.rand(6, 3, 16, 16)
    torch.manual_seed(5)
    whole = augment(images)
    torch.manual_seed(5)
    assert torch.equal(augment(images[2:4], Rows(2, 2, 6)), whole[2:4])
    layer, images = StochasticDepth(0.5).train(), images.flatten(2)
    torch.manual_seed(5)
    whole = layer(images)
    share_rows(layer, Rows(2, 2, 6))
    torch.manual_seed(5)
    assert torch.equal(layer(images[2:4]), whole[2:4])


# --- whole runs ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--nproc", 2),
        ("--nproc", 2, "--grad-accum", 2),
        ("--grad-accum", 4),
        ("--nproc", 2, "--shard"),
        ("--nproc", 2, "--shard", "--grad-accum", 2, "--checkpoint-activations"),
    ],
)
def test_ranks_and_parts_of_a_transformers_batch_change_nothing_but_rounding(more, data, tokenizer, alone, tmp_path):
    folder, one = alone
    several = train("transformer", data, tmp_path / "several", *tokenizer, "--epochs", 2, *more)
    for name in ("loss", "loss_last", "gradient_norm", "validation_loss"):
        assert several[name] == pytest.approx(one[name], rel=1e-4), name
    compare(folder, tmp_path / "several")


@pytest.mark.slow
def test_ranks_change_nothing_but_rounding_of_a_tokenizer(data, tmp_path):
    """Adversary, hits of the codebook, and the moving average are of the whole batch."""
    one = train("tokenizer", data, tmp_path / "one", "--epochs", 1)
    several = train("tokenizer", data, tmp_path / "several", "--epochs", 1, "--nproc", 2)
    for name in ("squared_error", "quantization", "adversarial", "adversary", "gradient_norm", "validation_psnr"):
        assert several[name] == pytest.approx(one[name], rel=2e-3), name
    compare(tmp_path / "one", tmp_path / "several")


AT_RANK_1 = """import os
if os.environ.get("RANK") == "1":
    pass
"""
NAN = """
from varcli.training.tokenizer import TokenizerStage
prepare = TokenizerStage.prepare
def poisoned(self, *arguments):
    self.model.decoder.conv_out.bias.data.fill_(float("nan"))
    return prepare(self, *arguments)
TokenizerStage.prepare = poisoned
"""
ELSEWHERE = "os.chdir('elsewhere')"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("done_by_rank_1", "more", "code", "line"),
    [
        ("", ("--batch-size", 1), 2, "--batch-size must be a multiple of 2 processes times --grad-accum 1 (got 1)"),
        (NAN, (), 5, "the loss is not finite at step 1; try a lower --base-lr in another --out"),
        (
            ELSEWHERE,
            (),
            3,
            "rank 0 reads 24 images (rank 1 23): n01443537 12 (rank 1 11); all must read the same data",
        ),
    ],
)
def test_what_goes_wrong_at_one_rank_ends_all_in_one_line(done_by_rank_1, more, code, line, data, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(AT_RANK_1 + textwrap.indent(done_by_rank_1, "    "))
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(data, tmp_path / "elsewhere" / "data")
    (tmp_path / "elsewhere" / "data" / "n01443537" / "n01443537_3.png").unlink()
    path = os.pathsep.join([str(tmp_path), *sys.path])
    words = command("tokenizer", "data", tmp_path / "run", "--epochs", 1, "--nproc", 2, "--quiet", *more)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"var: error: {line}\n")
    assert not list(tmp_path.glob("run/*.safetensors"))


def compare(one, several):
    """The averaged weights agree to rounding, of which Adam's division makes more where gradients are small."""
    ours, theirs = (load_tensors(folder / "state.safetensors")[0] for folder in (one, several))
    assert ours.keys() == theirs.keys()
    # The transformer's mask, -inf in part, is no weight.
    names = [name for name in ours if name.startswith("average.") and ours[name].isfinite().all()]
    assert len(names) > 10
    distance = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in names)
    size = sum(float(ours[name].double().square().sum()) for name in names)
    assert (distance / size) ** 0.5 < 1e-3


@pytest.mark.slow
def test_a_run_goes_on_sharded_or_not(data, tokenizer, tmp_path):
    adapted = (*tokenizer, "--shared-adaln", "--adapter", "lora:4")
    shard = ("--nproc", 2, "--shard")
    for epochs, more in ((1, shard), (2, ()), (3, shard)):
        one = train("transformer", data, tmp_path / "one", *adapted, "--epochs", epochs)
        several = train("transformer", data, tmp_path / "several", *adapted, "--epochs", epochs, *more)
        assert several["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert several["step"] == 9
    compare(tmp_path / "one", tmp_path / "several")


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_says_how_to_go_on_and_does_with_another_number(data, tmp_path):
    whole = train("tokenizer", data, tmp_path / "whole", "--epochs", 4, "--save-every", 2)
    words = command("tokenizer", data, tmp_path / "killed", "--epochs", 4, "--save-every", 2, "--nproc", 2)
    running = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "killed" / "state.safetensors").exists():
        time.sleep(0.02)
        assert running.poll() is None
    children = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(running.pid)], text=True)
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 5
    assert "was ended by SIGKILL; run the command again to resume" in error.splitlines()[-1]
    assert "Traceback" not in error
    gone_on = train("tokenizer", data, tmp_path / "killed", "--epochs", 4, "--save-every", 2)
    assert gone_on["step"] == whole["step"]
    assert gone_on["validation_psnr"] == pytest.approx(whole["validation_psnr"], abs=0.5)


LONGER = ("--epochs", 8, "--save-every", 2)


@pytest.fixture(scope="module")
def longer(data, tokenizer, tmp_path_factory):
    """A longer transformer's run of one process: its folder and last figures."""
    out = tmp_path_factory.mktemp("longer")
    return out, train("transformer", data, out, *tokenizer, *LONGER)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_goes_on_with_a_run_whose_rank_is_killed(rank, data, tokenizer, longer, tmp_path):
    folder, whole = longer
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    words = launcher + command("transformer", data, tmp_path / "killed", *tokenizer, *LONGER)[1:]
    running = subprocess.Popen(
        words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "killed" / "state.safetensors").exists():
        time.sleep(0.02)
        assert running.poll() is None
    children = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(running.pid)], text=True)
    os.kill(int(children.split()[rank]), signal.SIGKILL)
    result, error = running.communicate(timeout=120)
    assert running.returncode == 0, error
    assert json.loads(result)["step"] == whole["step"]
    compare(folder, tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_saves_and_ends_with_143(workers, data, tmp_path):
    """Schedulers send it to all processes of a command, those that read images ahead among them."""
    words = command("tokenizer", data, tmp_path / "run", "--epochs", 50, "--save-every", 5, "--workers", workers)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "run" / "state.safetensors").exists():
        time.sleep(0.02)
        assert running.poll() is None
    os.killpg(running.pid, signal.SIGTERM)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 143
    stopped = re.search(r"stopped after step (\d+) of 150, with the state saved", error)
    assert load_tensors(tmp_path / "run" / "state.safetensors")[1]["step"] == stopped[1]
