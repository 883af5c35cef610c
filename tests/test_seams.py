"""The seams: what it takes to add a sampling option, in a copy of the package with one field more."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import varcli
from support import small
from support.extractors import save as save_inception

pytestmark = pytest.mark.slow

FIELD = '    sparkle: float = option(0.0, "A made-up option.")\n'
AFTER = "    smooth: bool = option("


@pytest.fixture(scope="module")
def var(tmp_path_factory):
    """Run the `var` of a package whose SampleConfig has one field more; returns stdout."""
    root = tmp_path_factory.mktemp("source")
    shutil.copytree(
        Path(varcli.__file__).parent, root / "varcli", ignore=shutil.ignore_patterns("*.safetensors", "*.npz")
    )
    config = root / "varcli" / "config.py"
    text = config.read_text(encoding="utf-8")
    assert text.count(AFTER) == 1
    config.write_text(text.replace(AFTER, FIELD + AFTER), encoding="utf-8")
    checkpoints = Path(varcli.__file__).parents[2] / "checkpoints.toml"
    if checkpoints.exists():  # in a checkout it lies at the root, installed inside the package
        shutil.copy(checkpoints, root / "varcli" / "checkpoints" / "checkpoints.toml")
    folder = tmp_path_factory.mktemp("work")
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "VAR_CHECKPOINT": str(small.save(folder / "small.safetensors")),
        "VAR_INCEPTION": str(save_inception(folder / "inception.pth")),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "COLUMNS": "200",
    }

    def run(*words, python=("-m", "varcli")):
        command = [sys.executable, *python, *map(str, words)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return done.stdout, done.stderr

    run.folder = folder
    return run


def test_a_field_is_an_option_of_every_command_that_samples(var):
    commands = ("sample", "inpaint", "outpaint", "edit", "eval", "bench")
    script = f"from varcli import cli; [cli.run([command, '--help']) for command in {commands}]"
    out, _ = var(python=("-c", script))
    assert out.count("--sparkle") == out.count("A made-up option.") == len(commands)


def test_a_field_is_in_the_provenance_and_in_the_command_that_reproduces_an_image(var):
    var("sample", "-c", "1", "--sparkle", 0.5, "-o", "sparkling.png", "-q")
    out, _ = var("show", "sparkling.png", "--json")
    facts = json.loads(out)
    assert facts["sparkle"] == 0.5 and "--sparkle 0.5" in facts["command"]
    assert "sparkle 0.5" in var("show", "sparkling.png")[0]


def test_a_field_decides_whether_an_image_is_done(var):
    asked = ("sample", "-c", "1,207", "-o", "several", "--resume", "--dtype", "fp32")
    var(*asked, "--sparkle", 0.5)
    assert "nothing left to do" in var(*asked, "--sparkle", 0.5)[1]
    assert "nothing left to do" not in var(*asked, "--sparkle", 0.25)[1]


def test_a_field_is_in_results_and_on_the_report(var):
    for value in (0.5, 0.25):
        var("eval", "--is", "-n", 10, "--sparkle", value, "-o", f"result-{value}.json")
    assert json.loads((var.folder / "result-0.5.json").read_text())["checkpoint"]["sparkle"] == 0.5
    var("report", "result-0.5.json", "result-0.25.json", "-o", "report.md")
    assert "sparkle" in (var.folder / "report.md").read_text(encoding="utf-8")
