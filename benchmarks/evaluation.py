"""Images per second of feature extraction, and of sampling with evaluation, compared with torch-fidelity.

    python benchmarks/evaluation.py [--inception FILE] [--count 64] [--rounds 3] [--device cpu] [--json]
    python benchmarks/evaluation.py --pipeline N [--checkpoint NAME|FILE] …

The first compares feature extraction alone: ours, and torch-fidelity's extractor with the batch size of its command
line. The second compares two pipelines from a checkpoint to FID and inception score: `var eval`, which extracts
features while it samples, and `var sample` to PNGs followed by torch-fidelity's command line on the folder. Each runs
in its own processes, and both find the reference's statistics in their caches, where the warm-up round leaves them.

All are interleaved round by round, so that a machine that is busy for a while slows down all of them. Unless weights
are given, they are random: they cost the same.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tables import print_rows
from torch_fidelity import FeatureExtractorInceptionV3

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import extractors as random_inception
from varcli.acceleration.devices import pick_device, synchronize
from varcli.checkpoints.registry import resolve_checkpoint
from varcli.checkpoints.store import load_model
from varcli.evaluation.extractors import Inception

THEIR_BATCH = 64
"""The batch size of torch-fidelity's command line."""

Row = dict[str, object]


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run in each round; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rows(seconds: dict[str, list[float]], count: int, slow: str) -> list[Row]:
    """Return a row per run: median images per second, and the speedup over the slow one within a round."""
    return [
        {
            "what": name,
            "images/s": round(count / statistics.median(taken), 2),
            "times faster": round(
                statistics.median(other / own for own, other in zip(taken, seconds[slow], strict=True)), 2
            ),
        }
        for name, taken in seconds.items()
    ]


# --- features --------------------------------------------------------------------------------------


def extraction(weights: Path, count: int, rounds: int, device: torch.device) -> list[Row]:
    """Return images per second of both extractors, on images of tiny64's size and of the released models'."""
    ours = Inception(weights, device)
    asked = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("", asked, feature_extractor_weights_path=str(weights)).to(device)
    found: list[Row] = []
    for side in (64, 256):
        pixels = np.random.RandomState(0).randint(0, 256, (count, side, side, 3)).astype(np.uint8)

        def plain(pixels: np.ndarray = pixels) -> None:
            batches = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().split(THEIR_BATCH)
            with torch.inference_mode():
                torch.cat([theirs(batch.to(device))[0].cpu() for batch in batches])

        def fast(pixels: np.ndarray = pixels) -> None:
            ours.features(pixels).pool_BN.cpu()
            synchronize(device)

        seconds = interleaved({"torch-fidelity": plain, "varcli": fast}, rounds)
        found += [{"pixels": side} | row for row in rows(seconds, count, "torch-fidelity")]
    return found


# --- the whole pipeline ----------------------------------------------------------------------------


def pipeline(weights: Path, checkpoint: str, each: int, rounds: int, device: torch.device) -> list[Row]:
    """Return images per second from a checkpoint to FID and inception score, `each` per class, of both pipelines."""
    count = each * load_model(resolve_checkpoint(checkpoint)).transformer.config.class_count
    with tempfile.TemporaryDirectory() as name:
        folder, seeds = Path(name), iter(range(0, 1000 * each, each))  # no round finds images of an earlier one
        reference = random_inception.write(folder / "reference", random_inception.images(count, side=64))
        common = ("--checkpoint", checkpoint, "--preset", "metrics", "--device", device, "--quiet")
        where = ("--gpu", device.index or 0) if device.type == "cuda" else ("--cpu",)
        cache = ("--cache-root", folder / "theirs", "--input2-cache-name", "reference")

        def ours() -> None:
            measured = ("--num", count, "--seed", next(seeds), "--reference", reference, "--inception", weights)
            call("var", "eval", *measured, *common, cache=folder / "ours")

        def theirs() -> None:
            seed = next(seeds)
            made = folder / f"made{seed}"
            call("var", "sample", "-c", "all", "-n", each, "--seed", seed, "-o", made, *common, cache=folder / "ours")
            inputs = ("--input1", made, "--input2", reference, "--feature-extractor-weights-path", weights)
            call("fidelity", *where, "--isc", "--fid", *inputs, *cache, cache=folder / "ours")

        seconds = interleaved({SAMPLE_FIRST: theirs, "var eval": ours}, rounds)
    return [{"images": count} | row for row in rows(seconds, count, SAMPLE_FIRST)]


SAMPLE_FIRST = "var sample, then fidelity"


def call(program: str, *words: object, cache: Path) -> None:
    """Run a program of this Python's environment, with its own cache."""
    command = [str(Path(sys.executable).with_name(program)), *map(str, words)]
    where = os.environ | {"XDG_CACHE_HOME": str(cache)}
    subprocess.run(command, check=True, env=where, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Measure and print a Markdown table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights; random unless given")
    parser.add_argument("--count", type=int, default=64, help="number of images whose features are extracted")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--pipeline", type=int, metavar="N", help="measure pipelines instead, with N images per class")
    parser.add_argument("--checkpoint", default="tiny64", help="name or file of the model to sample from")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    given = parser.parse_args()
    device = pick_device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        weights = given.inception or random_inception.save(Path(folder) / "weights.pth")
        if given.pipeline:
            found = pipeline(weights.resolve(), given.checkpoint, given.pipeline, given.rounds, device)
        else:
            found = extraction(weights, given.count, given.rounds, device)
    print_rows(found, as_json=given.json)


if __name__ == "__main__":
    main()
