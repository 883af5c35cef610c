"""Speed and memory on a GPU, and what each optimization contributes, in one run of less than ten minutes.

    python benchmarks/gpu.py [--dtype bf16] [--seconds 4] [--limit 560] [--json gpu.json]
    python benchmarks/gpu.py --device cpu --quick          # tiny models, to check that it runs

It measures models of released shapes with random weights, which cost what trained ones cost, sampling images with the
paper's settings into the host's memory. The ways to sample them are interleaved round by round; figures are medians.

captured     what `var sample` does: fused blocks, Triton kernels, CUDA graphs; pixels are copied meanwhile
no Triton    as captured, but with torch's operations instead of the kernels in varcli/acceleration
eager        as captured, but without CUDA graphs
plain blocks as eager, but without fused blocks: the readable loop, in batches
naive        the naive sampler, which is the specification: one image at a time in float32, without a cache
int8, approximate … captured with `--quantize int8` and with each `--approximate`
raster       the same transformer token by token, captured: the baseline of `var bench --vs raster`

`latency` is from the request to the last pixel of a batch that runs alone, `images/s` is the throughput of batches in
a row, and `MFU` is their rate of operations (see `varcli/benchmarking/flops.py`) as a fraction of the rate of plain
matrix products, which is measured in every round. `times plain` and `times captured` are the speedups in images/s
over plain blocks and over captured, `times naive` is the speedup in latency over the naive sampler. `peak` is the
peak memory with only the models and captured on the GPU. `training` is `var train transformer` with each of its
options for speed.

The most important parts come first. If a part or a way fails, that is reported and the others are measured; parts that
have not begun before `--limit` are left out. The JSON file is written after every part.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from gpu_log import Log, Row, elapsed
from gpu_parts import beside_captured, decoder_choices, differing, frozen, machine, measure, tried, whole_pipeline
from gpu_training import training
from gpu_ways import CONFIG, Run, main_ways
from tables import print_rows

from varcli.acceleration.devices import pick_device, pick_dtype
from varcli.config import APPROXIMATIONS


@dataclass(frozen=True)
class Target:
    """A bound on one of the figures."""

    model: str
    batch: int
    figure: str
    bound: float
    at_most: bool = False

    def row(self, speed: Sequence[Row]) -> Row:
        """Return the measured figure, and whether it meets the target."""
        target = f"{self.model}, {self.batch} at a time: {self.figure} {'<=' if self.at_most else '>='} {self.bound:g}"
        wanted = {"model": self.model, "batch": self.batch, "way": "captured"}
        found = [row[self.figure] for row in speed if wanted.items() <= row.items()]
        if not found or not isinstance(found[0], int | float):
            return {"target": target, "found": "not measured", "holds": None}
        holds = found[0] <= self.bound if self.at_most else found[0] >= self.bound
        return {"target": target, "found": found[0], "holds": holds}


TARGETS = (
    Target("d16", 1, "latency ms", 15, at_most=True),
    Target("d16", 64, "images/s", 250),
    Target("d30", 64, "images/s", 60),
    Target("d30", 64, "peak GB", 26, at_most=True),
    Target("d16", 1, "times naive", 3),
    Target("d16", 64, "times plain", 2),
)

Parts = dict[str, Callable[[], None]]


def all_parts(run: Run) -> Parts:
    """Return the parts by name, the most important first."""
    models = lru_cache(maxsize=1)(run.models)  # of one depth at a time, or the peak memory includes the others
    large, others = (2, ()) if run.quick else (64, (256, 128, 8))
    log, found = run.log, Parts()

    def main(part: str, depth: int, batch: int) -> None:
        made = models(depth)
        makers = main_ways(run, made, batch, depth)
        log.speed.extend(measure(run, part, f"d{depth}", made, batch=batch, makers=makers))

    def beside(part: str, way: str, batch: int) -> None:
        log.speed.extend(beside_captured(run, part, models(16), batch, way))

    def raster(part: str, batch: int) -> None:
        with frozen():  # a graph is captured for each token
            beside(part, "raster", batch)

    for depth, batch in ((16, 1), (16, large), (30, large), (30, 1)):
        part = f"d{depth}, {batch} at a time"
        found[part] = partial(main, part, depth, batch)
    found["pipeline"] = lambda: log.keep({"pipeline": whole_pipeline(run, models(16), large)})
    found["training"] = lambda: log.keep({"training": training(run, "training", 16, large)})
    for way in ("int8", *(f"approximate {name}" for name in APPROXIMATIONS)):
        for batch in (1, large):
            part = f"d16, {batch} at a time, {way}"
            found[part] = partial(beside, part, way, batch)
    for batch in others:
        part = f"d16, {batch} at a time"
        found[part] = partial(main, part, 16, batch)
    found["batches"] = lambda: log.keep({"batches": differing(models(16), large)})
    found["decoder"] = lambda: log.keep({"decoder": decoder_choices(run, models(16), min(large, 16))})
    for batch in (1, large):
        part = f"d16, {batch} at a time, raster"
        found[part] = partial(raster, part, batch)
    return found


def do(run: Run, parts: Parts) -> None:
    """Measure one part after the other, and write the file in between."""
    for part, work in parts.items():
        if run.log.begin(part):
            tried(run, part, work)
            run.log.keep(summary(run.log.speed))
            run.log.end(part)


def summary(speed: Sequence[Row]) -> Row:
    """Return what follows from the figures so far."""
    rates = [rate for row in speed if isinstance(rate := row["matmul TFLOP/s"], int | float)]
    rate = statistics.median(rates) if rates else None
    return {"matmul TFLOP/s": rate, "seconds": elapsed(), "targets": [target.row(speed) for target in TARGETS]}


def print_all(log: Log) -> None:
    """Print the results as tables, the parts that are missing, and the targets."""
    facts = {name: value for name, value in log.found.items() if isinstance(value, str | int | float)}
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n\n")
    for part in ("speed", "pipeline", "training", "batches", "decoder"):
        found: Any = log.found.get(part)
        if found:
            print_rows(found if isinstance(found, list) else [found], as_json=False)
            sys.stdout.write("\n")
    for part, row in log.parts.items():
        if row["outcome"] != "done":
            sys.stdout.write(f"{part}: {row['outcome']}\n")
    words: dict[object, str] = {True: "holds", False: "fails", None: ""}
    for row in (target.row(log.speed) for target in TARGETS):
        sys.stdout.write(f"{row['target']:<44}{row['found']!s:>13} {words[row['holds']]}".rstrip() + "\n")


def main() -> None:
    """Measure and print tables; write everything as JSON if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="where to measure")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), help="precision; by default the best for the GPU")
    parser.add_argument("--seconds", type=float, default=4, help="time for each way at each batch size")
    parser.add_argument("--limit", type=float, default=560, help="seconds after which no part is begun")
    parser.add_argument("--quick", action="store_true", help="tiny models, to check that it runs")
    parser.add_argument("--json", type=Path, help="file for all results, written after each part")
    given = parser.parse_args()
    device = pick_device(given.device)
    precision = given.dtype or (pick_dtype("auto", device) if device.type == "cuda" else "bf16")
    log = Log(given.json, given.limit)
    run = Run(device, precision, given.quick, 0 if given.quick else given.seconds, log)
    log.keep({"dtype": precision, "quick": run.quick, "config": asdict(CONFIG)})
    do(run, {"machine": lambda: log.keep(machine(run))} | all_parts(run))
    print_all(log)


if __name__ == "__main__":
    main()
