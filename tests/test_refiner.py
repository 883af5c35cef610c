"""Two models in one run: `--refiner` and `--refine-from`, from the command line and from Python."""

import json

import numpy as np
import pytest

import varcli
from support import small
from varcli import cli
from varcli.checkpoints.store import load_model, save_model
from varcli.classes import ClassTable
from varcli.errors import CheckpointError
from varcli.images.provenance import read_provenance, reproduction_command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return small.save(folder / "large.safetensors", depth=3), small.save(folder / "small.safetensors", depth=1)


@pytest.fixture
def var(files, monkeypatch, tmp_path, capsys):
    """Run `var` with the larger model in an empty folder; return what it printed."""
    monkeypatch.setenv("VAR_CHECKPOINT", str(files[0]))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = cli.run([*map(str, arguments), "--device", "cpu", "--dtype", "fp32"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, err

    return run


def test_the_refiner_draws_the_fine_scales(files):
    large = varcli.load(files[0], device="cpu", dtype="fp32")
    alone = large.sample(207, seed=3)[0].array
    assert np.array_equal(large.sample(207, seed=3, refiner=files[0], refine_from=2)[0].array, alone)
    assert not np.array_equal(large.sample(207, seed=3, refiner=files[1], refine_from=3)[0].array, alone)
    photo = np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8)
    box = {"box": (10, 10, 30, 30), "label": 207}
    edited = large.inpaint(photo, refiner=files[1], refine_from=2, **box)
    assert not np.array_equal(edited.array, large.inpaint(photo, **box).array)
    both = {"refiner": files[1], "refine_from": 3}
    sample = large.sample(207, seed=3, **both)[0].array
    assert np.array_equal(large.edit(photo, 207, strength=1.0, seed=3, **both).array, sample)


def test_provenance_command_and_resume(files, var, tmp_path):
    asked = ("sample", "-c", "207", "--refiner", files[1], "--refine-from", 3, "-o", "one")
    var(*asked)
    (path,) = (tmp_path / "one").iterdir()
    provenance = read_provenance(path)
    assert (provenance.settings.refiner, provenance.settings.refine_from) == (str(files[1]), 3)
    assert provenance.refiner_sha256 == varcli.load(files[1]).sha256
    assert f"--refiner {files[1]} --refine-from 3" in reproduction_command(provenance)
    assert cli.run(["show", str(path)]) == 0
    content = path.read_bytes()
    assert "nothing left to do" in var(*asked, "--resume")[1]
    again = var("sample", "-c", "207", "--refiner", files[1], "--refine-from", 2, "-o", "one", "--resume")[1]
    assert "nothing left to do" not in again
    assert path.read_bytes() == content, "an image of other settings is written beside it"
    assert len(list((tmp_path / "one").iterdir())) == 2


def test_show_names_the_refiner(files, var, capsys):
    var("sample", "-c", "207", "--refiner", files[1], "--refine-from", 3, "-o", "x.png")
    assert cli.run(["show", "x.png"]) == 0
    out = capsys.readouterr().out
    assert f"refiner    {files[1]}, sha256 {varcli.load(files[1]).sha256}\n" in out
    assert cli.run(["show", "x.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refine_from"] == 3


def test_other_classes_are_refused(files, tmp_path):
    model = load_model(files[1])
    table = ClassTable(tuple(reversed(model.classes.entries)))
    save_model(tmp_path / "other.safetensors", model.tokenizer, model.transformer, table, {})
    large = varcli.load(files[0], device="cpu")
    with pytest.raises(CheckpointError, match="has other classes"):
        large.sample(207, refiner=tmp_path / "other.safetensors", refine_from=2)
