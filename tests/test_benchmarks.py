"""Every benchmark can be imported; the one for GPUs loses no results, whatever fails.

That it measures everything is in `test_gpu_benchmark.py`.
"""

import importlib
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_it_can_be_loaded(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    assert runpy.run_path(str(path), run_name="loaded")["__doc__"]


# --- gpu.py is run once, on a lent machine, and may be killed ----------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS[0].parent)
    return importlib.import_module("gpu")


@pytest.fixture
def run(gpu, tmp_path):
    return gpu.Run(torch.device("cpu"), "bf16", True, 0, gpu.Log(tmp_path / "gpu.json"))


def done(gpu, run, *names):
    """Return the content of the JSON file after these parts."""
    gpu.do(run, {name: work for name, work in gpu.all_parts(run).items() if name in names})
    return json.loads(run.log.path.read_text())


def outcomes(found):
    return {row["part"]: row["outcome"] for row in found["parts"]}


def failing(after=0):
    """Return a way to sample images that fails after this many calls."""
    made = []

    def make(count, first):
        made.append(count)
        if len(made) > after:
            raise RuntimeError("CUDA error:\n  misaligned address")

    return make


@pytest.mark.parametrize("way", ["captured", "eager"])
@pytest.mark.parametrize("after", [0, 5], ids=["at once", "in the second round"])
def test_one_way_that_fails_ends_no_other(gpu, run, monkeypatch, way, after):
    ways = gpu.main_ways
    monkeypatch.setattr(gpu, "main_ways", lambda *given: ways(*given) | {way: failing(after)})
    found = done(gpu, run, "d16, 1 at a time")
    assert {row["way"] for row in found["speed"]} == {
        "captured",
        "no Triton",
        "eager",
        "plain blocks",
        "naive",
    } - {way}
    assert outcomes(found) == {
        "d16, 1 at a time": "done",
        f"d16, 1 at a time: {way}": "failed: RuntimeError: CUDA error: misaligned address",
    }
    assert all((row["times captured"] is None) == (way == "captured") for row in found["speed"])


def test_one_part_that_fails_ends_no_other(gpu, run, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "main_ways", lambda *given: {"captured": failing(), "eager": failing()})
    monkeypatch.setattr(gpu, "whole_pipeline", failing())  # which knows no third argument: an error of another kind
    found = done(gpu, run, "d16, 1 at a time", "pipeline", "batches")
    assert found["speed"] == [] and "pipeline" not in found and found["batches"]["batch"] == 2
    assert outcomes(found)["d16, 1 at a time"] == "failed: RunError: all ways to sample images failed"
    assert outcomes(found)["pipeline"].startswith("failed: TypeError: ")
    assert outcomes(found)["batches"] == "done"
    assert "1 at a time: eager: failed: RuntimeError: CUDA error: misaligned address (" in capsys.readouterr().err
    gpu.print_all(run.log)
    assert "pipeline: failed: TypeError: " in capsys.readouterr().out


def test_everything_is_on_the_disk_after_each_part(gpu, run):
    seen = []
    gpu.do(
        run,
        {
            "first": lambda: run.log.speed.append({"way": "eager", "matmul TFLOP/s": 1.0}),
            "second": lambda: seen.append(json.loads(run.log.path.read_text())),
        },
    )
    assert seen[0]["speed"] == [{"way": "eager", "matmul TFLOP/s": 1.0}] and seen[0]["matmul TFLOP/s"] == 1
    assert outcomes(seen[0]) == {"first": "done", "second": "under way"}
    assert [path.name for path in run.log.path.parent.iterdir()] == ["gpu.json"]


def test_a_part_that_would_begin_too_late_is_left_out(gpu, run, capsys):
    late = failing()
    gpu.do(run, {"first": lambda: setattr(run.log, "limit", 0.0), "second": lambda: late(1, 0)})
    left_out = "left out: the limit of 0 s was reached"
    assert outcomes(json.loads(run.log.path.read_text())) == {"first": "done", "second": left_out}
    assert f"second: {left_out}\n" in capsys.readouterr().err


def test_the_limit_is_an_option(gpu, tmp_path, monkeypatch, capsys):
    file = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--limit", "0", "--json", str(file)])
    gpu.main()
    assert all(outcome.startswith("left out") for outcome in outcomes(json.loads(file.read_text())).values())
    printed = capsys.readouterr().out
    assert "d30, 64 at a time: left out" in printed and printed.count("not measured\n") == len(gpu.TARGETS)


def test_what_matters_most_comes_first(gpu, run):
    names = list(gpu.all_parts(replace(run, quick=False)))
    assert names[:3] == ["d16, 1 at a time", "d16, 64 at a time", "d30, 64 at a time"]
    later = [
        "pipeline",
        "d16, 1 at a time, int8",
        "d16, 64 at a time, approximate cache",
        "d16, 256 at a time",
        "batches",
    ]
    assert sorted(later, key=names.index) == later
    assert names[-2:] == ["d16, 1 at a time, raster", "d16, 64 at a time, raster"]


def test_peak_memory_is_that_of_captured_without_cublas_workspaces(gpu, run, monkeypatch):
    parts, called = importlib.import_module("gpu_parts"), []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, name=name: called.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1e9 * called.count("made"))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: called.append("clear"), raising=False)
    ways = {way: lambda count, first: called.append("made") for way in ("captured", "eager")}
    on_gpu = replace(run, device=torch.device("cuda"))
    assert parts.warm_up(on_gpu, "part", 1, ways) == 3
    assert called[:5] == ["synchronize", "clear", "empty_cache", "reset_peak_memory_stats", "made"]
    assert parts.warm_up(on_gpu, "part", 1, {"captured": failing(), "eager": ways["eager"]}) is None


def test_targets_are_judged_by_captured(gpu):
    captured = {"model": "d16", "way": "captured", "latency ms": 15.1, "images/s": 66.0, "times naive": 3.0}
    many = captured | {"batch": 64, "images/s": 250.0, "times plain": None}
    other = {"model": "d30", "batch": 64, "way": "eager", "images/s": 99.0, "peak GB": None}
    rows = [target.row([captured | {"batch": 1}, many, other]) for target in gpu.TARGETS]
    assert [row["holds"] for row in rows] == [False, True, None, None, True, None]
    assert [row["found"] for row in rows] == [15.1, 250.0, *["not measured"] * 2, 3.0, "not measured"]
    assert rows[0]["target"] == "d16, 1 at a time: latency ms <= 15"
