"""`var bench`: tables for people, tabs for pipes, JSON for programs, a chart, and one line where that cannot be."""

import json
import re

import pytest
from PIL import Image

from support import small
from varcli import cli
from varcli.benchmarking import timing
from varcli.checkpoints import random_init
from varcli.commands import bench as bench_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture
def bench(model, monkeypatch, tmp_path, capfd):
    """Run `var bench` with the small model; return exit code, stdout and stderr."""
    monkeypatch.setenv("VAR_CHECKPOINT", str(model))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "CPU_SIZE", 64)

    def run(*arguments):
        code = cli.run(["bench", "--device", "cpu", "--rounds", "1", *arguments])
        return code, *capfd.readouterr()

    return run


def test_tables_in_a_pipe(bench):
    code, out, err = bench("--vs", "naive,raster", "--dtype", "fp32")
    rows = [line.split("\t") for line in out.splitlines()]
    assert (code, err) == (0, "")
    named = {row[0]: row[1:] for row in rows}
    assert named["precision"] == ["fp32", "fp32", "fp32"]
    assert named["batch size"] == ["1", "1", "1"]
    assert named["CUDA graphs"] == ["no", "no", "no"]
    assert all(float(cell) > 0 for cell in named["seconds per image"])
    assert named["times varcli's"][0] == "1"
    assert {
        "images per second, one batch alone",
        "latency p50, s",
        "latency p90, s",
        "latency p99, s",
        "GFLOP per image",
    } <= named.keys()
    assert [row[0] for row in rows[-7:]] == [
        *(f"transformer {part}" for part in ("1 × 1", "2 × 2", "4 × 4", "16 tokens")),
        "token sampling",
        "decoder",
        "PNG",
    ]
    assert named["transformer 4 × 4"][2] == "" and named["transformer 16 tokens"][:2] == ["", ""]


def test_json_is_one_object(bench, model):
    code, out, _ = bench("--json", "--vs", "raster", "--batch-size", "2", "--dtype", "bf16")
    (line,) = out.splitlines()
    found = json.loads(line)
    assert code == 0
    assert (found["kind"], found["checkpoint"], found["random"], found["rounds"]) == (
        "varcli-bench",
        str(model),
        False,
        1,
    )
    assert (found["device"], found["settings"]["cfg"], found["settings"]["approximate"]) == ("cpu", 1.5, "")
    assert found["hardware"] and found["version"]
    ours, raster = found["samplers"]
    assert set(ours) == {
        "sampler",
        "precision",
        "batch_size",
        "seconds_per_image",
        "images_per_second",
        "latency",
        "times_varcli",
        "operations",
        "matmul_rate",
        "matmul_fraction",
        "cuda_graphs",
        "stages",
    }
    assert (ours["sampler"], raster["sampler"], ours["precision"]) == ("varcli", "raster", "bf16")
    assert set(ours["latency"]) == {"p50", "p90", "p99"}
    assert [(stage["phase"], stage["step"]) for stage in ours["stages"]] == [
        ("transformer", "1 × 1"),
        ("transformer", "2 × 2"),
        ("transformer", "4 × 4"),
        ("token sampling", ""),
        ("decoder", ""),
        ("PNG", ""),
    ]
    # One round, so that medians add up as its own laps do.
    assert sum(stage["seconds"] for stage in ours["stages"][:-1]) == pytest.approx(ours["seconds_per_image"])


def test_a_chart(bench, tmp_path):
    heights = []
    for others in ([], ["--vs", "naive"]):
        code, out, _ = bench("-o", "chart.png", *others)
        with Image.open(tmp_path / "chart.png") as image:
            assert (code, image.format, image.size[0]) == (0, "PNG", 960)
            heights.append(image.size[1])
        assert "seconds per image" in out
    assert heights[1] > heights[0]


def test_the_chart_is_there_before_the_tables(bench, tmp_path, monkeypatch):
    """Whoever reads them may stop reading, which ends the command."""
    found = []
    monkeypatch.setattr(bench_command, "table", lambda *rows: found.append((tmp_path / "chart.png").exists()))
    bench("--out", "chart.png")
    assert found == [True, True]


def test_random_weights_need_no_download(bench, model, monkeypatch):
    """In a released checkpoint's shape; here it is the small model's."""
    monkeypatch.setattr(random_init, "shapes", lambda checkpoint, shapes=random_init.shapes: shapes(str(model)))
    code, out, _ = bench("--random", "-m", "var-d16", "--json")
    found = json.loads(out)
    assert (code, found["checkpoint"], found["random"]) == (0, "var-d16", True)


def test_approximations_are_in_the_settings(bench):
    code, out, _ = bench("--json", "--approximate", "guidance")
    assert code == 0 and json.loads(out)["settings"]["approximate"] == "guidance"


MISTAKES = [
    (["--vs", "fast"], 2, r"--vs must be naive, raster, or naive,raster \(got fast\)"),
    (["--vs", ""], 2, r"--vs must be naive, raster, or naive,raster \(got \)"),
    (["--rounds", "0"], 2, r"--rounds must be at least 1 \(got 0\)"),
    (["--batch-size", "0"], 2, r"--batch-size must be at least 1 \(got 0\)"),
    (
        ["--approximate", "magic"],
        2,
        r"--approximate takes some of guidance, tokens, cache, .* \(got magic\)",
    ),
    (["--quantize", "int8", "--dtype", "bf16"], 2, "--quantize int8 sets the precision, .*"),
    (["--device", "gpu"], 2, r"--device must be auto, cpu, cuda, cuda:1 or mps .got gpu."),
    (["-o", "chart.jpg"], 2, r"--out must be a name ending in \.png \(got chart\.jpg\)"),
    (["-o", "nowhere/chart.png"], 5, r"nowhere/chart\.png cannot be written: there is no folder nowhere"),
    (
        ["-m", "absent.safetensors"],
        4,
        r"the checkpoint absent\.safetensors does not exist: give a file, or .*",
    ),
    (["-m", "var-d17", "--random"], 4, r"there is no checkpoint var-d17: neither a file nor one of the names .*"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_mistakes(bench, arguments, code, message):
    found, out, err = bench(*arguments)
    assert (found, out) == (code, "")
    assert re.fullmatch(f"var: error: {message}\n", err), err
