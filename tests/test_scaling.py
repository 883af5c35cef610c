"""Scaling laws: the fit finds what data were made of, and the commands train, fit and draw."""

import dataclasses
import json
import re
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from support.fork_server import python
from support.images import write_folder
from varcli.checkpoints.safetensors_io import load_tensors, save_tensors
from varcli.checkpoints.store import read_metadata, run_facts, save_model
from varcli.classes import ClassEntry, ClassTable
from varcli.cli import run
from varcli.config import TokenizerConfig, TransformerConfig
from varcli.errors import InputError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.training import scaling
from varcli.training.scaling import JointLaw, Trained, fit_joint, fit_power, frontier, intervals

pytestmark = pytest.mark.slow

SIZES, AMOUNTS = np.meshgrid([6e5, 2e6, 4.7e6, 9e6, 1.6e7], [1e6, 4e6, 1.6e7, 6.4e7])
N, D = SIZES.ravel(), AMOUNTS.ravel()
TRUE = JointLaw(E=4.2, A=80, alpha=0.3, B=400, beta=0.4)


# --- the fit ---------------------------------------------------------------------------------------


def test_a_law_is_found_again():
    found = fit_joint(N, D, TRUE.predict(N, D))
    for name, value in dataclasses.asdict(TRUE).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3)


def test_a_run_gone_wrong_hardly_matters():
    loss = TRUE.predict(N, D)
    loss[3] *= 1.2
    found = fit_joint(N, D, loss)
    assert pytest.approx(TRUE.E, rel=0.01) == found.E
    assert found.alpha == pytest.approx(TRUE.alpha, rel=0.03)


def test_no_irreducible_part_is_found_where_there_is_none():
    found = fit_joint(N, D, 80 / N**0.3 + 400 / D**0.4)
    assert pytest.approx(0, abs=0.01) == found.E
    assert found.alpha == pytest.approx(0.3, rel=0.02)


def test_a_term_that_would_be_negative_is_left_out():
    found = fit_joint(N, D, 4 + 1e-3 * np.log(N) + 400 / D**0.4)  # larger models are worse
    assert (found.A, found.alpha) == (0, 0)
    assert pytest.approx(4.015, rel=1e-3) == found.E
    assert found.beta == pytest.approx(0.4, rel=1e-2)


def test_one_amount_of_data_gives_a_law_in_size():
    sizes = N[:5]
    found = fit_joint(sizes, D[:5], 5 + 80 / sizes**0.3)
    assert (found.B, found.beta) == (0, 0)
    assert pytest.approx(5, rel=1e-3) == found.E
    assert found.alpha == pytest.approx(0.3, rel=1e-2)


def test_intervals_hold_the_truth_and_narrow_with_the_noise(monkeypatch):
    monkeypatch.setattr(scaling, "DRAWS", 20)
    noise = np.random.default_rng(0).normal(size=len(N))
    widths = []
    for size in (0.001, 0.004):
        ends = intervals(N, D, TRUE.predict(N, D) * np.exp(size * noise))
        assert ends["E"][0] < TRUE.E < ends["E"][1]
        assert ends["alpha"][0] < TRUE.alpha < ends["alpha"][1]
        widths.append(ends["E"][1] - ends["E"][0])
    assert widths[0] < 0.6 * widths[1]


@pytest.mark.parametrize(
    ("count", "message"), [(2, r"models of at least three sizes \(got 2\)"), (1, r"at least three sizes \(got 1\)")]
)
def test_too_few_sizes_are_refused(count, message):
    with pytest.raises(InputError, match=message):
        fit_joint(N[:count].repeat(4), D[: 4 * count], np.ones(4 * count))


def test_the_papers_form_is_found_again():
    sizes = np.array([0.1, 0.3, 0.6, 2.0])
    found = fit_power(sizes, 5 + (2.5 * sizes) ** -0.2, floor=5)
    assert (found.beta, found.alpha) == (pytest.approx(2.5), pytest.approx(-0.2))
    assert found.correlation == pytest.approx(-1)
    with pytest.raises(InputError, match="below the irreducible part"):
        fit_power(sizes, sizes, floor=1)
    for hardly in (0, 1e-6):
        with pytest.raises(InputError, match="needs figures that differ"):
            fit_power(sizes, 0.95 + hardly * sizes)


def test_the_frontier_is_what_no_cheaper_run_beats():
    assert frontier([(4, 1.0), (1, 3.0), (2, 3.5), (3, 2.0), (5, 1.5)]) == [(1, 3.0), (3, 2.0), (4, 1.0)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_parameters_are_counted_as_the_model_has_them(depth, shared):
    shape = {"sides": (1, 2, 3), "codebook_size": 128, "codebook_width": 8, "class_count": 7, "shared_adaln": shared}
    config = TransformerConfig(depth=depth, width=64 * depth, **shape)
    assert scaling.all_parameters(config) == sum(p.numel() for p in Transformer(config).parameters())
    assert scaling.block_parameters(config) == 73_728 * depth**3


def test_operations_are_those_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = TransformerConfig(depth=2, width=128, sides=(1, 2, 3), codebook_size=128, codebook_width=8, class_count=7)
    model = Transformer(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.tensor([1]), torch.randn(1, config.length - 1, 8)).sum().backward()
    assert scaling.image_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.03)


# --- the commands ----------------------------------------------------------------------------------

TOKENIZER = TokenizerConfig(
    sides=(1, 2), codebook_size=16, codebook_width=8, base_width=32, multipliers=(1, 1), encoder_blocks=1
)


def write_run(folder, depth, images_seen, loss=None, label="cat", **facts):
    """A folder as `var train transformer` leaves it, of a model whose loss follows TRUE."""
    config = TransformerConfig(
        depth=depth, width=64 * depth, sides=(1, 2), codebook_size=16, codebook_width=8, class_count=1
    )
    torch.manual_seed(0)
    made = Trained(name="", config=config, images_seen=images_seen, images=None, figures={})
    loss = float(TRUE.predict(scaling.all_parameters(config), made.tokens)) if loss is None else loss
    figures = {"loss": loss, "loss_last": loss, "accuracy": 1 - loss / 100, "accuracy_last": 1 - loss / 100}
    folder.mkdir(parents=True)
    run_facts = {"step": 9, "steps": 9, "images_seen": images_seen, "images": images_seen} | figures | facts
    classes = ClassTable((ClassEntry(0, label, label),))
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    save_model(folder / "model.safetensors", Tokenizer(TOKENIZER), model, classes, run_facts, torch.float16)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 9, "images_seen": images_seen, "loss": loss}) + "\n")
    return folder


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ladder")
    return [
        write_run(root / f"d{depth}-{seen}", depth, seen) for depth in (1, 2, 3) for seen in (2_000, 20_000, 200_000)
    ]


def test_the_token_maps_of_a_ladder_may_be_named_too(ladder, tmp_path, capsys):
    """As by `ladder/*`."""
    (tmp_path / "tokens" / "tokens-0123").mkdir(parents=True)
    assert run(["scaling", "fit", *map(str, ladder), str(tmp_path / "tokens"), "--no-intervals"]) == 0
    (tmp_path / "d1").mkdir()
    assert run(["scaling", "fit", *map(str, ladder), str(tmp_path / "d1"), "--no-intervals"]) == 3
    assert "has no metrics.jsonl: give the folder of a run that has logged figures" in capsys.readouterr().err


def test_fit_prints_the_law_and_predicts(ladder, tmp_path, capsys):
    command = ["scaling", "fit", *map(str, ladder), "--no-intervals", "--depth", "4", "--json"]
    assert run([*command, "--figure", str(tmp_path / "laws.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    law = found["laws"]["loss"]
    assert law["joint"]["E"] == pytest.approx(TRUE.E, rel=0.02)
    assert law["joint"]["alpha"] == pytest.approx(TRUE.alpha, rel=0.05)
    assert law["paper"]["parameters"] == {"beta": 2.5, "alpha": -0.2}
    deeper = dataclasses.replace(
        TransformerConfig(depth=4, width=256, sides=(1, 2), codebook_size=16, codebook_width=8, class_count=1)
    )
    expected = TRUE.predict(scaling.all_parameters(deeper), 200_000 * deeper.length)
    assert found["predicted"]["loss"] == pytest.approx(float(expected), rel=0.002)
    with Image.open(tmp_path / "laws.png") as figure:
        assert figure.width == 960
    assert run(["scaling", "fit", *map(str, ladder), "--no-intervals"]) == 0
    assert "loss_last in N" in capsys.readouterr().out


def test_what_the_runs_do_not_determine_is_told(tmp_path, capsys):
    runs = [
        str(write_run(tmp_path / f"{depth}-{seen}", depth, seen, loss=4 + depth / 100 + 1e4 / seen, accuracy=0.1))
        for depth in (1, 2, 3)
        for seen in (2_000, 20_000, 200_000)
    ]
    figure = tmp_path / "laws.svg"
    assert run(["scaling", "fit", *runs, "--no-intervals", "--json", "--figure", str(figure)]) == 0
    out, error = capsys.readouterr()
    laws = json.loads(out)["laws"]
    assert "error" not in laws
    assert (laws["loss"]["joint"]["A"], laws["loss"]["joint"]["alpha"]) == (0, 0)
    assert "cross-entropy, all scales: does not fall with N in these runs, so α is 0\n" in error
    assert "token error, all scales: no law is fitted, since a power law needs figures that differ" in error
    assert "token error, all scales" not in figure.read_text()


def test_runs_of_several_tokenizers_or_data_sets_are_refused(tmp_path, capsys):
    first, tokenizer = (write_run(tmp_path / name, 1, 10) for name in ("first", "tokenizer"))
    for folder in (first, tokenizer):
        identity = {"identity": json.dumps({"tokenizer": f"that of {folder.name}"})}
        save_tensors(folder / "state.safetensors", {"a": torch.zeros(1)}, identity)
    data = write_run(tmp_path / "data", 1, 10, label="dog")
    for other, message in (
        (tokenizer, "tokenizer was trained with another tokenizer than first: give runs of one"),
        (data, "data was trained on other classes than first: give runs of one data set"),
    ):
        assert run(["scaling", "fit", str(first), str(other)]) == 3
        assert capsys.readouterr().err == f"var: error: {message}\n"


def test_a_run_that_has_not_ended_is_refused(ladder, tmp_path, capsys):
    odd = write_run(tmp_path / "odd", 3, 200_000, step=5)
    assert run(["scaling", "fit", *map(str, ladder), str(odd), "--no-intervals"]) == 3
    assert "is at step 5 of 9: only an ended schedule counts" in capsys.readouterr().err


def test_a_run_without_its_figures_is_refused(ladder, tmp_path, capsys):
    for change in ({"loss": 5}, {"run": 5}):
        odd = write_run(tmp_path / f"odd-{change}", 3, 200_000)
        model = odd / "model.safetensors"
        tensors, metadata = load_tensors(model)
        save_tensors(model, tensors, metadata | {"run": json.dumps(change.get("run", change))})
        assert run(["scaling", "fit", *map(str, ladder), str(odd), "--no-intervals"]) in (3, 4)
        assert re.search(r"has no held-out figures|the metadata of the checkpoint", capsys.readouterr().err)


def test_repeated_images_are_told_apart_from_new_ones(ladder, tmp_path, capsys):
    again = write_run(tmp_path / "again", 3, 200_001, images=20)
    assert run(["scaling", "fit", *map(str, ladder), str(again), "--no-intervals"]) == 0
    assert "1 of 10 runs saw each image more than 4 times, again among them" in capsys.readouterr().err


def test_a_ladder_is_trained_and_goes_on(tmp_path, capsys):
    data = write_folder(tmp_path / "data", {"cat": 12, "dog": 12})
    tokenizer = write_run(tmp_path / "model", 1, 10) / "model.safetensors"
    command = ["scaling", "run", str(data), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "runs")]
    command += ["--depths", "1,2", "--passes", "1,2", "--batch-size", "4", "--holdout", "2", "--workers", "0", "-q"]
    assert run(command) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "runs" / name) for name in ("d1-e1", "d2-e1", "d1-e2", "d2-e2")
    ]
    written = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*/model.safetensors")}
    assert len(written) == 4
    assert len(list((tmp_path / "runs" / "tokens").iterdir())) == 2  # one for training and one for validation
    assert run(command) == 0
    assert {path: path.read_bytes() for path in written} == written


def test_two_ranks_train_the_ladder_that_one_trains(tmp_path, capsys):
    data = write_folder(tmp_path / "data", {"cat": 12, "dog": 12})
    tokenizer = write_run(tmp_path / "model", 1, 10) / "model.safetensors"
    command = ["scaling", "run", str(data), "--tokenizer", str(tokenizer), "--depths", "1,2", "--passes", "1"]
    command += ["--batch-size", "4", "--holdout", "2", "--workers", "0", "--dtype", "fp32", "-q"]
    assert run([*command, "--out", str(tmp_path / "one")]) == 0
    words = [python(), "-m", "varcli", *command, "--out", str(tmp_path / "two"), "--nproc", "2"]
    for _ in range(2):  # also where all runs are finished
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(tmp_path / "two" / name) for name in ("d1-e1", "d2-e1")]
    for name in ("d1-e1", "d2-e1"):
        paths = [tmp_path / out / name / "model.safetensors" for out in ("one", "two")]
        one, two = (run_facts(path, read_metadata(path)[0]) for path in paths)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["fit", "nowhere"], 3, "there is no training run nowhere: give its folder"),
        (["fit", "x", "--images", "9"], 2, "--images needs --depth"),
        (["fit", "x", "--figure", "missing/laws.png"], 5, "missing"),
        (["fit", "x", "--figure", "laws.jpg"], 2, "--figure must be a name ending in .png or .svg (got laws.jpg)"),
        (["run", "x", "--tokenizer", "t", "-o", "o", "--depths", "a"], 2, "--depths must be whole numbers"),
        (["run", "x", "--tokenizer", "t", "-o", "o", "--passes", "a"], 2, "--passes must be numbers separated"),
        (["run", "x", "--tokenizer", "t", "-o", "o", "--epochs", "3"], 2, "No such option: --epochs"),
    ],
)
def test_mistakes_are_one_line(words, code, message, capsys):
    assert run(["scaling", *words]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
