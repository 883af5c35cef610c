"""Writing images: how many per second each sink takes, and how much memory a long run needs.

    python benchmarks/streaming.py [--pixels 256] [--images 200] [--rounds 5] [--json]
    python benchmarks/streaming.py --memory 200,2000 [--checkpoint tiny64] [--json]

The first table has images per second for given pixels, written one after the other (`Sink.add`) and in threads
(`AsyncWriter`), as `var sample` does it; interleaved, medians. A slower sampler never waits for the sink. With
`--memory` the peak memory of whole runs of `var sample` with these numbers of images is measured; it should not grow
with them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tables import print_rows

from varcli.config import SampleConfig
from varcli.images.provenance import Provenance
from varcli.outputs.async_writer import AsyncWriter
from varcli.outputs.open import open_sink

if TYPE_CHECKING:
    from varcli.sampling.sampler import Pixels

SINKS = ("folder", "samples.npz", "samples.tar", "-")


@dataclass(frozen=True)
class Item:
    """An image to be written."""

    provenance: Provenance


def photograph(pixels: int) -> "Pixels":
    """Return an image that compresses about as well as a real one: smooth, with a little noise."""
    source = np.random.default_rng(0)
    coarse = Image.fromarray(source.integers(0, 250, (pixels // 8, pixels // 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize((pixels, pixels), Image.Resampling.BICUBIC))
    return smooth + source.integers(0, 6, smooth.shape, np.uint8)


def items(count: int) -> list[Item]:
    """Return the provenances of this many images."""
    common = {"checkpoint": "x", "checkpoint_sha256": "0" * 64, "class_id": 207, "class_name": "golden retriever"}
    computed = {"device": "cuda", "dtype": "bf16", "version": "0"}
    return [Item(Provenance(**common, **computed, settings=SampleConfig(), seed=seed)) for seed in range(count)]


def seconds(sink: str, wanted: list[Item], pixels: "Pixels", threads: bool) -> float:
    """Return how long it takes to write the same pixels for all items."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with open_sink(os.devnull if sink == "-" else f"{folder}/{sink}", several=True) as output:
            if threads:
                with AsyncWriter(output, lambda item, path: None, 64) as writer:
                    for item in wanted:
                        writer.put(item, writer.prepare(item, pixels))
            else:
                for item in wanted:
                    output.add(pixels, item.provenance)
        return time.perf_counter() - start


def speed(pixels: int, images: int, rounds: int) -> list[dict[str, object]]:
    """Return one row per sink."""
    image, wanted = photograph(pixels), items(images)
    rows: list[dict[str, object]] = []
    for sink in SINKS:
        taken: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for threads, times in taken.items():
                times.append(seconds(sink, wanted, image, threads))
        one, many = (statistics.median(taken[threads]) for threads in (False, True))
        rows.append(
            {
                "sink": sink,
                "one after the other, images/s": round(images / one),
                "in threads, images/s": round(images / many),
                "ratio": round(one / many, 2),
            }
        )
    return rows


def memory(counts: list[int], checkpoint: str) -> list[dict[str, object]]:
    """Return one row per sink: the peak memory of a whole run for each number of images."""
    rows = []
    for sink in SINKS:
        row: dict[str, object] = {"sink": sink}
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                words = ["sample", "-c", "random", "-n", str(count), "-m", checkpoint, "-o", sink, "--quiet"]
                process = subprocess.Popen(
                    [sys.executable, "-m", "varcli", *words], cwd=folder, stdout=subprocess.DEVNULL
                )
                _, status, used = os.wait4(process.pid, 0)
            assert status == 0
            row[f"{count} images, peak MB"] = round(used.ru_maxrss / 1024)
        rows.append(row)
    return rows


def main() -> None:
    """Measure and print a Markdown table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=256, help="pixels per side")
    parser.add_argument("--images", type=int, default=200, help="number of images per round")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--memory", metavar="N,N", help="measure the memory of runs of N images instead")
    parser.add_argument("--checkpoint", default="tiny64", help="for --memory: name or file of the model")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    given = parser.parse_args()
    if given.memory:
        rows = memory([int(number) for number in given.memory.split(",")], given.checkpoint)
    else:
        rows = speed(given.pixels, given.images, given.rounds)
    print_rows(rows, as_json=given.json)


if __name__ == "__main__":
    main()
