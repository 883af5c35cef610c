"""`var sample`: what is asked for is what comes out, whatever the batch, the order, the sink or the process."""

import io
import json
import shlex
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from support import small
from support.fork_server import python
from support.threads import one_thread
from varcli import cli
from varcli.checkpoints.safetensors_io import load_tensors, save_tensors
from varcli.checkpoints.store import recorded_hashes
from varcli.classes import imagenet
from varcli.images.contact_sheet import MAX_IMAGES
from varcli.images.provenance import read_provenance
from varcli.pipelines import model as model_pipeline
from varcli.pipelines import sample as sample_pipeline

TABLE = [imagenet().by_id(class_id) for class_id in small.CLASSES]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture
def sample(model, monkeypatch, tmp_path):
    """Run `var sample` with the small model in an empty folder; fail where it fails."""
    monkeypatch.setenv("VAR_CHECKPOINT", str(model))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert cli.run(["sample", "--device", "cpu", *map(str, arguments)]) == 0

    return run


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def pngs(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.png")}


def test_an_image_a_class_in_the_current_folder(sample, capsys, tmp_path):
    sample("-c", "golden retriever")
    out, err = capsys.readouterr()
    assert out == "207-golden_retriever-0.png\n"
    assert err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["207-golden_retriever-0.png"]
    assert pixels("207-golden_retriever-0.png").shape == (16, 16, 3)


def test_many_ways_to_name_classes(sample, capsys):
    sample("-c", "281,985", "-c", "none", "-c", "goldfish", "--out", "out", "--quiet")
    names = ["1-goldfish-0.png", "281-tabby-0.png", "985-daisy-0.png", "none-0.png"]
    assert sorted(pngs("out")) == names
    sample("-c", "all", "-n", 2, "--seed", 7, "--out", "all")
    assert len(capsys.readouterr().out.splitlines()) == 10
    assert {name.rsplit("-", 1)[1] for name in pngs("all")} == {"7.png", "8.png"}


def test_a_class_asked_for_again_goes_on(sample):
    sample("-c", 207, "-c", 1, "-c", 207, "-n", 2, "--out", "again")
    sample("-c", "1", "-n", 2, "--out", "once")
    sample("-c", "207", "-n", 4, "--out", "once")
    once = pngs("once")
    assert len(once) == 6 and pngs("again") == once


def test_random_classes_follow_the_seed(sample):
    sample("-c", "random", "-n", 12, "--out", "one")
    sample("-c", "random", "-n", 4, "--seed", 8, "--out", "other")
    one, other = pngs("one"), pngs("other")
    assert len({name.split("-")[0] for name in one}) > 2
    assert other.items() <= one.items() and len(other) == 4


def test_show_gives_the_command_that_makes_it_again(sample, capsys):
    options = ["--seed", 5, "--cfg", 2.5, "--top-k", 40, "--top-p", 0.9, "--smooth", "--dtype", "bf16"]
    sample("-c", "daisy", "-n", 2, "--out", "first", "--quiet", *options)
    assert cli.run(["show", "first/985-daisy-6.png"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].split(maxsplit=1)[1]
    assert cli.run(shlex.split(command)[1:]) == 0
    assert Path("985-daisy-6.png").read_bytes() == pngs("first")["985-daisy-6.png"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_neither_batch_nor_order_changes_an_image(sample, dtype):
    sample("-c", "1,207", "-n", 3, "--out", "a", "--batch-size", 1, "--dtype", dtype)
    sample("-c", "207,1", "-n", 3, "--out", "b", "--batch-size", 64, "--dtype", dtype)
    for seed in (2, 1, 0):
        sample("-c", "1,207", "--seed", seed, "--out", "c", "--batch-size", 3, "--dtype", dtype)
    assert len(pngs("a")) == 6
    assert pngs("a") == pngs("b") == pngs("c")


@pytest.mark.slow
def test_another_process_makes_the_same_image(sample, model):
    arguments = ["sample", "-c", "963", "--seed", "3", "--device", "cpu", "--quiet", "-m", str(model), "-o"]
    made = subprocess.run([sys.executable, "-m", "varcli", *arguments, "-"], capture_output=True, check=True)
    assert made.stderr == b""
    sample("-c", "963", "--seed", 3, "--out", "here.png")
    assert made.stdout == Path("here.png").read_bytes()


def test_every_setting_changes_the_image(sample):
    start = ["-c", 281, "--cfg", 2, "--top-k", 30, "--top-p", 0.9, "--quiet", "--out"]
    changes = {
        "start": [],
        "cfg": ["--cfg", 0],
        "top-k": ["--top-k", 1],
        "top-p": ["--top-p", 0.5],
        "smooth": ["--smooth"],
        "seed": ["--seed", 1],
        "class": ["-c", 1],  # beside 281, which is as at the start
    }
    for name, change in changes.items():
        sample(*start, name, *change)
    made = {pixels(path).tobytes() for name in changes for path in Path(name).iterdir()}
    assert len(made) == len(changes)


def test_presets_and_what_overrides_them(sample):
    sample("-c", 1, "--out", "default.png")
    sample("-c", 1, "--out", "metrics.png", "--preset", "metrics")
    sample("-c", 1, "--out", "mixed.png", "--preset", "metrics", "--top-k", 0, "--top-p", 0)
    settings = {
        name: (made.settings.cfg, made.settings.top_k, made.settings.top_p)
        for name in ("default", "metrics", "mixed")
        for made in [read_provenance(Path(f"{name}.png"))]
    }
    assert settings == {"default": (4.0, 900, 0.95), "metrics": (1.5, 900, 0.96), "mixed": (1.5, 0, 0)}


def test_every_sink_holds_the_same_pixels(sample, capsysbinary):
    sample("-c", "1,985", "-n", 2, "--out", "folder/inside")
    sample("-c", "1,985", "-n", 2, "--out", "all.npz")
    sample("-c", "1,985", "-n", 2, "--out", "all.tar")
    listed = capsysbinary.readouterr().out.decode().split()
    sample("-c", "1,985", "-n", 2, "--out", "-")
    stream = capsysbinary.readouterr().out
    files = [Path(line) for line in listed[:4]]
    expected = np.stack([pixels(path) for path in files])
    assert listed[4:] == ["all.npz", "all.tar"]
    assert np.array_equal(np.load("all.npz")["arr_0"], expected) and expected.dtype == np.uint8
    with tarfile.open("all.tar") as tar:
        members = [name for name in tar.getnames() if name.endswith(".png")]
        for name, path in zip(members, files, strict=True):
            assert np.array_equal(pixels(tar.extractfile(name)), pixels(path))
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        assert [tar.extractfile(name).read() for name in tar.getnames()] == [path.read_bytes() for path in files]
    sample("-c", "985", "--out", "-")
    assert capsysbinary.readouterr().out == files[2].read_bytes()


def test_json_lines_say_what_was_made(sample, capsys, model):
    sample("-c", "207,none", "--json", "--quiet")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["path"] == "207-golden_retriever-0.png"
    assert (first["class_id"], first["class_name"], first["seed"]) == (207, "golden retriever", 0)
    assert (second["class_id"], second["class_name"], second["checkpoint"]) == (None, "none", str(model))
    sample("-c", "207", "--json", "--out", "a.npz")
    assert json.loads(capsys.readouterr().out)["path"] == "a.npz"


def test_quiet_says_nothing(sample, capsys):
    sample("-c", "207", "--quiet", "--out", "a.tar")
    sample("-c", "207", "--quiet")
    assert capsys.readouterr() == ("", "")


def test_resume_makes_only_what_is_missing(sample, capsys):
    sample("-c", "1,207", "--out", "o")
    (Path("o") / "1-goldfish-0.png").unlink()
    before = (Path("o") / "207-golden_retriever-0.png").stat().st_mtime_ns
    capsys.readouterr()
    sample("-c", "1,207", "--out", "o", "--resume")
    assert capsys.readouterr().out.split() == [str(Path("o") / "1-goldfish-0.png")]
    assert (Path("o") / "207-golden_retriever-0.png").stat().st_mtime_ns == before
    sample("-c", "1,207", "--out", "o", "--resume", "--cfg", 0)
    assert len(capsys.readouterr().out.split()) == 2


def test_a_class_known_by_a_part_of_its_name_is_told(sample, capsys):
    sample("-c", "dais", "--dtype", "fp32")
    assert capsys.readouterr() == (
        "985-daisy-0.png\n",
        "var: --class dais is taken to be 985 (daisy): no other class of this model fits\n",
    )
    sample("-c", "dais", "--quiet")
    assert capsys.readouterr() == ("", "")


def test_nothing_left_to_do_is_said(sample, capsys):
    for out in ("o", "o.npz", "o.tar"):
        for quiet in ((), ("--quiet",)):
            sample("-c", "1,207", "--out", out, "--dtype", "fp32", "--quiet")
            sample("-c", "1,207", "--out", out, "--dtype", "fp32", "--resume", *quiet)
            said = "" if quiet else "var: nothing left to do: 2 images requested, none missing\n"
            assert capsys.readouterr() == (f"{out}\n" if Path(out).is_file() and not quiet else "", said)


def test_stdin_is_answered_line_by_line(sample, capsys, monkeypatch):
    seen = []

    def lines():
        yield "207\n"
        seen.append(capsys.readouterr().out)
        yield "\n"
        yield "none, 207\n"
        seen.append(capsys.readouterr().out)

    said = lines()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=lambda _: next(said, "")))
    sample("-c", "-")
    assert seen == ["207-golden_retriever-0.png\n", "none-0.png\n207-golden_retriever-1.png\n"]


def test_a_sheet_takes_no_more_from_stdin_than_from_the_command_line(sample, capsys, monkeypatch):
    monkeypatch.setattr(sample_pipeline, "MAX_IMAGES", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n" * 4))
    assert cli.run(["sample", "-c", "-", "--grid", "grid.png"]) == 2
    out, err = capsys.readouterr()
    assert out == "1-goldfish-0.png\n1-goldfish-1.png\n"
    assert err.splitlines() == ["var: error: --grid can show at most 2 images (got 3)"]


@pytest.mark.parametrize(
    ("outputs", "code"),
    [
        (["--grid", "g.jpg"], 2),
        (["--grid", "no/g.png"], 5),
        (["--growth", "g.webp"], 2),
        (["--out", "x.jpg"], 2),
        (["--out", "no/x.png"], 5),
        (["--out", "file/x.npz"], 5),
        (["--out", "file/folder/inside"], 5),
    ],
)
def test_outputs_are_checked_before_a_checkpoint_is_downloaded(sample, monkeypatch, tmp_path, outputs, code):
    def download(*_, **__):
        raise AssertionError("several gigabytes")

    monkeypatch.setattr(model_pipeline, "resolve_checkpoint", download)
    (tmp_path / "file").touch()
    assert cli.run(["sample", "-c", "1", *outputs]) == code
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_contact_sheet_and_growing_image(sample, capsys):
    sample("-c", "1,207,281", "--out", "o", "--grid", "grid.png")
    out, err = capsys.readouterr()
    assert len(out.split()) == 3 and err == "var: also written: grid.png\n"
    assert pixels("grid.png").shape[1] > 3 * 192
    sample("-c", "1", "--growth", "strip.png", "--out", "one.png")
    sample("-c", "1", "--growth", "strip.gif", "--out", "two.png")
    with Image.open("strip.gif") as animation:
        assert animation.n_frames == len(small.SIDES)
    assert read_provenance(Path("strip.png")) == read_provenance(Path("one.png"))
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes() == pngs("o")["1-goldfish-0.png"]


@pytest.mark.parametrize(
    "mistake",
    [
        (["-c", "tench"], 3, "this checkpoint does not know 0 tench; the nearest of the 5 it knows are 1 goldfish"),
        (["-c", "0"], 3, "var-d16 knows all 1000: --checkpoint var-d16"),
        (["-c", "1", "-o", "-", "--json"], 2, "--json cannot be used with --out -: stdout can carry"),
        (["-c", "1", "--resume", "--grid", "g.png"], 2, "--resume cannot be used with --grid or --growth"),
        (["-c", "1", "--grid", "g.jpg"], 2, "--grid must be a name ending in .png (got g.jpg)"),
        (["-c", "1", "--grid", "no/g.png"], 5, "there is no folder no"),
        (["-c", "1", "--growth", "g.webp"], 2, "--growth must be a name ending in .png or .gif (got g.webp)"),
        (["-c", "1,207", "--growth", "g.gif"], 2, "--growth shows exactly one image (got 2 images)"),
        (["-c", "-", "--growth", "g.gif"], 2, "--growth shows exactly one image (got any number of images)"),
        (["-c", "1", "-n", str(MAX_IMAGES + 1), "--grid", "g.png"], 2, f"(got {MAX_IMAGES + 1})"),
        (["-c", "1", "-n", "2", "-o", "x.png"], 2, "--out x.png is one file, but there are several images"),
        (["-c", "1", "-o", "no/x.png"], 5, "there is no folder no"),
        (["-c", "1", "--cfg", "-1"], 2, "--cfg must be 0 (no guidance) or more (got -1)"),
        (["-c", "1", "--top-p", "1.5"], 2, "--top-p must be between 0 (off) and 1 (got 1.5)"),
        (["-c", "1", "--quantize", "int8", "--dtype", "bf16"], 2, "--quantize int8 sets the precision"),
        (
            ["-c", "1", "--approximate", "cash"],
            2,
            "--approximate takes some of guidance, tokens, cache, separated by commas, or all (got cash)",
        ),
        (["-c", "-", "--nproc", "2"], 2, "--class - needs one process"),
        (["-c", "1", "--growth", "g.gif", "--nproc", "2"], 2, "--growth needs one process"),
        (["-c", "1", "--cfg", "1e38"], 2, "--cfg must be at most 1000 (got 1e+38)"),
        (["-c", "1", "--nproc", "0"], 2, "--nproc must be at least 1 (got 0)"),
        (["-c", "1", "--nproc", "100000"], 2, "--nproc 100000 is too much for this machine"),
        (["-c", "1", "--device", "cuda:99"], 2, "this machine has no device cuda:99, only cpu"),
        (
            ["-c", "1", "-m", "no.safetensors"],
            4,
            "the checkpoint no.safetensors does not exist: give a file, or a name of `var checkpoints list`",
        ),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(model, monkeypatch, tmp_path, capsys, mistake):
    arguments, code, message = mistake
    monkeypatch.setenv("VAR_CHECKPOINT", str(model))
    monkeypatch.chdir(tmp_path)
    assert cli.run(["sample", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("var: error: ") and err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "-c", "1", "-o", "x.png"],
        ["sample", "-c", "1", "-o", "x.npz"],
        ["inpaint", "hole.png", "--box", "2,2,9,9", "-o", "x.png"],
        ["edit", "hole.png", "-c", "1", "--box", "2,2,9,9", "-o", "x.png"],
        ["outpaint", "hole.png", "--pad", "4,0,0,0", "-o", "x.png"],
        ["reconstruct", "hole.png", "-o", "x.png"],
        ["checkpoints", "verify"],
    ],
    ids=" ".join,
)
def test_values_that_are_not_finite_are_told_before_an_image_is_made(model, monkeypatch, tmp_path, capsys, arguments):
    tensors, metadata = load_tensors(model)
    for name in ("transformer.head.bias", "tokenizer.quant_conv.bias"):
        tensors[name][:3] = torch.nan
    save_tensors(tmp_path / "bad.safetensors", tensors, metadata | recorded_hashes(tensors, metadata))
    Image.new("RGB", (16, 16), (200, 100, 0)).save(tmp_path / "hole.png")
    monkeypatch.chdir(tmp_path)
    words = [*arguments, "bad.safetensors"] if arguments[0] == "checkpoints" else [*arguments, "-m", "bad.safetensors"]
    assert cli.run(words) == 4
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "3 values in t" in err and "that are not finite: train or convert again" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors", "hole.png"]


@pytest.mark.parametrize("name", ["x.npz", "x.tar"])
def test_an_archive_of_an_earlier_run_is_replaced_with_a_word(sample, capsys, name):
    sample("-c", "207", "-n", 2, "-o", name, "--dtype", "fp32")
    sample("-c", "207", "-n", 3, "-o", name, "--dtype", "fp32", "--resume")
    assert capsys.readouterr().err == ""
    sample("-c", "207", "-o", name, "--dtype", "fp32")
    assert f"{name} is from an earlier run and will be replaced; --resume would" in capsys.readouterr().err
    Path(name).rename(f"{name}.part")  # as a run that was stopped leaves it
    sample("-c", "207", "-o", name, "--dtype", "fp32")
    assert f"{name}.part is from an earlier run" in capsys.readouterr().err


def test_images_nobody_asked_for_this_time_are_told_of(sample, capsys):
    sample("-c", "207", "-n", 3, "-o", "several.npz")
    sample("-c", "207", "-n", 1, "-o", "several.npz", "--resume")
    assert "several.npz also holds 2 images of an earlier run that were not requested" in capsys.readouterr().err


# --- rejection -------------------------------------------------------------------------------------


class Redness(nn.Module):
    """Is the surer of every class but the first the redder an image is."""

    def forward(self, image_B3PP: torch.Tensor) -> torch.Tensor:
        red_B = image_B3PP[:, 0].mean((1, 2)) - image_B3PP[:, 1].mean((1, 2))
        return torch.stack([red_B * 0, red_B * 9, red_B * 9, red_B * 9, red_B * 9], 1)


@pytest.fixture
def redness(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to retire TorchScript
        torch.jit.save(torch.jit.script(Redness()), str(tmp_path / "redness.pt"))
    return tmp_path / "redness.pt"


def test_the_best_of_several_are_kept(sample, redness):
    sample("-c", "207,963", "-n", 2, "--best-of", 2, "--classifier", redness, "-o", "best")
    sample("-c", "207,963", "-n", 4, "-o", "drawn")

    def red(path):
        found = pixels(path).astype(float)
        return found[..., 0].mean() - found[..., 1].mean()

    for class_id in (207, 963):
        drawn = sorted(Path("drawn").glob(f"{class_id}-*"), key=red)
        kept = {path.name: path.read_bytes() for path in Path("best").glob(f"{class_id}-*")}
        assert kept == {path.name: path.read_bytes() for path in drawn[2:]}


def test_the_best_may_be_chosen_early(sample, redness):
    asked = ("-c", "207", "-n", 2, "--best-of", 3, "--classifier", redness, "--dtype", "fp32")
    sample(*asked, "--decide-at", 2, "-o", "early")
    sample("-c", "207", "-n", 6, "--dtype", "fp32", "-o", "drawn")
    assert len(list(Path("early").iterdir())) == 2
    for path in Path("early").iterdir():
        assert path.read_bytes() == (Path("drawn") / path.name).read_bytes()


def test_the_best_go_on_too(sample, redness, capsys):
    asked = ("-c", "207,963", "-n", 2, "--best-of", 2, "--classifier", redness, "-o", "best.npz")
    sample(*asked)
    before = Path("best.npz").read_bytes()
    sample(*asked, "--resume")
    assert "nothing left to do: 4 images requested, none missing" in capsys.readouterr().err
    assert Path("best.npz").read_bytes() == before


@pytest.mark.slow
def test_two_processes_judge_together(sample, redness):
    asked = ["-c", "207,963,985", "-n", "1", "--best-of", "2", "--classifier", str(redness), "--dtype", "fp32"]
    with one_thread():
        sample(*asked, "-o", "alone.npz")
    command = [python(), "-m", "varcli", "sample", "--device", "cpu", *asked, "-o", "together.npz", "--nproc", "2"]
    subprocess.run(command, check=True, timeout=300)
    assert Path("together.npz").read_bytes() == Path("alone.npz").read_bytes()


@pytest.mark.parametrize("wanted", ["none", "random"])
def test_a_classifier_needs_a_class(model, redness, monkeypatch, capsys, wanted):
    monkeypatch.setenv("VAR_CHECKPOINT", str(model))
    monkeypatch.chdir(redness.parent)
    assert cli.run(["sample", "-c", wanted, "-n", "9", "--best-of", "2", "--classifier", str(redness), "-o", "x"]) == 2
    assert "--best-of cannot be used with --class none or random" in capsys.readouterr().err
