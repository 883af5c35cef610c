"""All that is to be known about a GPU, in one run of less than ten minutes: speed, memory, what each part brings.

    python benchmarks/gpu.py [--dtype bf16] [--seconds 4] [--limit 560] [--json gpu.json]
    python benchmarks/gpu.py --device cpu --quick          # models of no size, to see that it works

It measures models of released shapes with random weights, which cost what trained ones cost, on images of the
paper's settings, pixels in the host's memory. The ways to make them take turns in every round; medians.

recorded     what `var sample` does: fused blocks, Triton's kernels, CUDA graphs; pixels fetched meanwhile
no Triton    the same with torch's operations instead of the kernels in varcli/models
eager        without graphs
plain blocks the same without fused blocks either: the readable loop, in batches
plain twin   the specification: one image at a time in float32, without a cache
int8, approximate … what `--quantize int8` and each `--approximate` make of `recorded`
raster       the same transformer token by token, recorded: the baseline of `var bench --vs raster`

`latency` is from the request to the last pixel with nothing else under way, `images/s` is with batches one after
the other, `MFU` their operations (see `varcli/benchmarking/operations.py`) over those of plain matrix products, which
are measured in every round. `times plain` and `times recorded` compare images/s with those of plain blocks and of
`recorded` in the same rounds, `times twin` latencies with the plain twin's. `peak` is of memory with the models and
`recorded` alone on the GPU. `training` is `var train transformer`, with each of its options for speed.

What matters most comes first. A part or a way that fails is noted down, and the others are measured; what is not begun
before `--limit` is left out. The JSON file is written after every part.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from gpu_book import Book, Row, age
from gpu_parts import beside_recorded, decoder_choices, differing, frozen, machine, measure, tried, whole_pipeline
from gpu_training import training
from gpu_ways import CONFIG, Run, main_ways
from tables import print_rows

from varcli.acceleration.devices import pick_device, pick_dtype
from varcli.config import APPROXIMATIONS


@dataclass(frozen=True)
class Target:
    """What a GPU is to reach."""

    model: str
    batch: int
    figure: str
    bound: float
    at_most: bool = False

    def row(self, speed: Sequence[Row]) -> Row:
        """Return what was found of it, and whether that will do."""
        target = f"{self.model}, {self.batch} at a time: {self.figure} {'<=' if self.at_most else '>='} {self.bound:g}"
        place = {"model": self.model, "batch": self.batch, "way": "recorded"}
        found = [row[self.figure] for row in speed if place.items() <= row.items()]
        if not found or not isinstance(found[0], int | float):
            return {"target": target, "found": "not measured", "holds": None}
        holds = found[0] <= self.bound if self.at_most else found[0] >= self.bound
        return {"target": target, "found": found[0], "holds": holds}


TARGETS = (
    Target("d16", 1, "latency ms", 15, at_most=True),
    Target("d16", 64, "images/s", 250),
    Target("d30", 64, "images/s", 60),
    Target("d30", 64, "peak GB", 26, at_most=True),
    Target("d16", 1, "times twin", 3),
    Target("d16", 64, "times plain", 2),
)

Parts = dict[str, Callable[[], None]]


def all_parts(run: Run) -> Parts:
    """Return what is measured, by name, the most important first."""
    models = lru_cache(maxsize=1)(run.models)  # those of one depth, so that the others are in nobody's peak
    large, others = (2, ()) if run.quick else (64, (256, 128, 8))
    book, found = run.book, Parts()

    def main(part: str, depth: int, batch: int) -> None:
        made = models(depth)
        makers = main_ways(run, made, batch, depth)
        book.speed.extend(measure(run, part, f"d{depth}", made, batch=batch, makers=makers))

    def beside(part: str, way: str, batch: int) -> None:
        book.speed.extend(beside_recorded(run, part, models(16), batch, way))

    def raster(part: str, batch: int) -> None:
        with frozen():  # a graph for each token is recorded
            beside(part, "raster", batch)

    for depth, batch in ((16, 1), (16, large), (30, large), (30, 1)):
        part = f"d{depth}, {batch} at a time"
        found[part] = partial(main, part, depth, batch)
    found["pipeline"] = lambda: book.keep({"pipeline": whole_pipeline(run, models(16), large)})
    found["training"] = lambda: book.keep({"training": training(run, "training", 16, large)})
    for way in ("int8", *(f"approximate {name}" for name in APPROXIMATIONS)):
        for batch in (1, large):
            part = f"d16, {batch} at a time, {way}"
            found[part] = partial(beside, part, way, batch)
    for batch in others:
        part = f"d16, {batch} at a time"
        found[part] = partial(main, part, 16, batch)
    found["batches"] = lambda: book.keep({"batches": differing(models(16), large)})
    found["decoder"] = lambda: book.keep({"decoder": decoder_choices(run, models(16), min(large, 16))})
    for batch in (1, large):
        part = f"d16, {batch} at a time, raster"
        found[part] = partial(raster, part, batch)
    return found


def do(run: Run, parts: Parts) -> None:
    """Do one part after the other, with everything on the disk in between."""
    for part, work in parts.items():
        if run.book.begin(part):
            tried(run, part, work)
            run.book.keep(summary(run.book.speed))
            run.book.end(part)


def summary(speed: Sequence[Row]) -> Row:
    """Return what follows from the figures there are so far."""
    rates = [rate for row in speed if isinstance(rate := row["matmul TFLOP/s"], int | float)]
    rate = statistics.median(rates) if rates else None
    return {"matmul TFLOP/s": rate, "seconds": age(), "targets": [target.row(speed) for target in TARGETS]}


def print_all(book: Book) -> None:
    """Print what was found as tables, the parts that are not among it, and the targets."""
    facts = {name: value for name, value in book.found.items() if isinstance(value, str | int | float)}
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n\n")
    for part in ("speed", "pipeline", "training", "batches", "decoder"):
        found: Any = book.found.get(part)
        if found:
            print_rows(found if isinstance(found, list) else [found], as_json=False)
            sys.stdout.write("\n")
    for part, row in book.parts.items():
        if row["outcome"] != "done":
            sys.stdout.write(f"{part}: {row['outcome']}\n")
    words: dict[object, str] = {True: "holds", False: "fails", None: ""}
    for row in (target.row(book.speed) for target in TARGETS):
        sys.stdout.write(f"{row['target']:<44}{row['found']!s:>13} {words[row['holds']]}".rstrip() + "\n")


def main() -> None:
    """Measure and print tables; write everything as JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="where to measure")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), help="the GPU's own choice without it")
    parser.add_argument("--seconds", type=float, default=4, help="for each way at each size of batch")
    parser.add_argument("--limit", type=float, default=560, help="seconds after which no part is begun")
    parser.add_argument("--quick", action="store_true", help="models of no size, once")
    parser.add_argument("--json", type=Path, help="a file for everything, written after each part")
    given = parser.parse_args()
    device = pick_device(given.device)
    precision = given.dtype or (pick_dtype("auto", device) if device.type == "cuda" else "bf16")
    book = Book(given.json, given.limit)
    run = Run(device, precision, given.quick, 0 if given.quick else given.seconds, book)
    book.keep({"dtype": precision, "quick": run.quick, "config": asdict(CONFIG)})
    do(run, {"machine": lambda: book.keep(machine(run))} | all_parts(run))
    print_all(book)


if __name__ == "__main__":
    main()
