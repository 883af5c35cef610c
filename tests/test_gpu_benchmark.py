"""The benchmark for GPUs runs from beginning to end, on tiny models and without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from varcli.config import APPROXIMATIONS

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_everything_is_measured(tmp_path):
    command = [sys.executable, "-W", "error", SCRIPT, "--device", "cpu", "--dtype", "bf16", "--quick"]
    done = subprocess.run(
        [*command, "--json", tmp_path / "all.json"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "all.json").read_text())
    measured = {(row["model"], row["batch"], row["way"]) for row in found["speed"]}
    beside = {
        ("d16", batch, way)
        for batch in (1, 2)
        for way in ("raster", *(f"approximate {name}" for name in APPROXIMATIONS))
    }
    assert {("d16", 1, "naive"), ("d16", 2, "captured"), ("d30", 1, "captured"), ("d30", 2, "eager")} <= measured
    assert beside <= measured and len(measured) == len(found["speed"])
    assert (("d16", 1, "int8") in measured) == torch.cpu._is_vnni_supported()
    assert all(row["images/s"] > 0 and row["latency ms"] > 0 and row["MFU"] >= 0 for row in found["speed"])
    assert found["pipeline"]["ratio"] > 0 and found["decoder"]["heuristic, ms"] > 0
    assert [(row["options"], row["images/s"] > 0) for row in found["training"]] == [("none", True)]
    assert 0 <= found["batches"]["tokens that differ"] <= 1
    assert found["matmul TFLOP/s"] > 0 and found["seconds"] < 600
    assert done.stdout.count("\n| --- |") == 5
