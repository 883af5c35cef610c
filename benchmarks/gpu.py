"""All that is to be known about a GPU, in one run of less than ten minutes: speed, memory, what each part brings.

    python benchmarks/gpu.py [--dtype bf16] [--seconds 4] [--json gpu.json]
    python benchmarks/gpu.py --device cpu --quick          # models of no size, to see that it works

It measures models of released shapes with random weights, which cost what trained ones cost, on pictures of the
paper's settings, pixels in the host's memory. The ways to make them take turns in every round; medians.

recorded     what `var sample` does: fused blocks, CUDA graphs, pixels fetched while the next batch is made
eager        the same without graphs
plain blocks the same without fused blocks either: the readable loop, in batches
plain twin   the specification: one picture at a time in float32, without a cache
int8, draft … what `--quantize int8` and each `--draft` make of `recorded`
raster       the same transformer token by token, recorded: the baseline of `var bench --vs raster`

`latency` is from the request to the last pixel with nothing else under way, `pictures/s` is with batches one after
the other, `MFU` their operations (see `varcli/benchmarking/operations.py`) over those of plain matrix products, which
are measured in every round, `times plain` is over the plain twin at batch 1 and over plain blocks beyond, `times
recorded` over `recorded` of the same rounds. `peak` is of memory with the models and `recorded` alone on the GPU.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from gpu_ways import CONFIG, Make, Run, TooLargeError, main_ways, other_ways, requests, sampling
from tables import print_rows

from varcli.benchmarking.contestants import Models, Wanted
from varcli.benchmarking.machine import hardware, matmul_rate
from varcli.benchmarking.operations import decoder_operations, transformer_operations
from varcli.data.images import Provenance
from varcli.data.outputs import open_output
from varcli.data.writing import Writer
from varcli.errors import RunError, UsageError
from varcli.sampling import sampler
from varcli.sampling.batches import BatchSampler
from varcli.sampling.devices import pick_device, pick_dtype, synchronize


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Return seconds, with nothing left to do at the beginning and at the end."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def measure(run: Run, name: str, models: Models, batch: int, makers: dict[str, Make]) -> list[dict[str, object]]:
    """Return a row a way to make pictures in batches of one size, "recorded" first; none if they do not fit."""
    try:
        return rows(run, name, models, batch, measured(run, batch, makers))
    except (TooLargeError, RunError, torch.OutOfMemoryError):
        sys.stderr.write(f"{name}: {batch} pictures at a time do not fit into memory: {', '.join(makers)}\n")
        return []


STREAM = 3
"""Batches one after the other."""


@dataclass(frozen=True)
class Taken:
    """What the rounds gave."""

    latency: dict[str, list[float]]
    """Seconds, of each way."""
    throughput: dict[str, list[float]]
    """Seconds a picture, of each way."""
    rates: list[float]
    """Of matrix products, one a round."""
    peak: float | None
    """Gigabytes of the first way, before any other was run."""


def measured(run: Run, batch: int, makers: dict[str, Make]) -> Taken:
    """Return what the ways took, taking turns; TooLargeError if they do not fit."""
    taken = Taken({way: [] for way in makers}, {way: [] for way in makers}, [], warm_up(run, batch, makers))
    until = time.perf_counter() + run.seconds * len(makers)
    while time.perf_counter() < until or len(taken.rates) < 3:
        for way, make in makers.items():
            taken.latency[way].append(timed(run.device, lambda make=make: make(batch, 0)))
            many = STREAM * batch
            taken.throughput[way].append(timed(run.device, lambda make=make, many=many: make(many, 0)) / many)
        taken.rates.append(matmul_rate(run.device, run.precision))
    return taken


def warm_up(run: Run, batch: int, makers: dict[str, Make]) -> float | None:
    """Make the batches that nobody counts; return what memory the first way takes."""
    on_gpu, peak = run.device.type == "cuda", None
    gc.collect()  # samplers of before and their recordings refer to each other
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    for make in makers.values():
        make(batch, 0), make(batch, 0), make(batch, 0)  # the second one records
        if on_gpu and peak is None:
            peak = torch.cuda.max_memory_allocated(run.device) / 1e9
    return peak


def rows(run: Run, name: str, models: Models, batch: int, taken: Taken) -> list[dict[str, object]]:
    """Return what there is to say of each way."""
    config = models[1].config
    tokens = {"raster": [1] * config.sides[-1] ** 2}
    medians = {way: statistics.median(seconds) for way, seconds in taken.throughput.items()}
    slowest = medians.get("plain twin", medians.get("plain blocks"))
    rate, found = statistics.median(taken.rates), []
    for way, seconds in medians.items():
        counts = tokens.get(way, [side * side for side in config.sides])
        operations = sum(transformer_operations(config, counts, guided=True)) + decoder_operations(models[0].config)
        found.append(
            {
                "model": name,
                "batch": batch,
                "way": way,
                "latency ms": round(1e3 * statistics.median(taken.latency[way]), 2),
                "pictures/s": round(1 / seconds, 2),
                "times plain": round(slowest / seconds, 2) if slowest else None,
                "times recorded": round(medians["recorded"] / seconds, 2),
                "MFU": round(operations / seconds / rate, 3),
                "matmul TFLOP/s": round(rate / 1e12, 2),
                "peak GB": round(taken.peak, 2) if taken.peak and way == "recorded" else None,
            }
        )
    return found


def variants(run: Run, models: Models, batch: int) -> list[dict[str, object]]:
    """Return a row for int8, for each draft and for the raster baseline, each measured beside `recorded`."""
    found: list[dict[str, object]] = []
    for way, prepared in other_ways(run, models, batch).items():
        try:
            both = {"recorded": sampling(models, batch), way: prepared()}
        except UsageError as error:
            sys.stderr.write(f"{error}\n")
            continue
        found += measure(run, "d16", models, batch, both)[1:]
    return found


PROVENANCE = Provenance(
    checkpoint="random", checkpoint_sha256="0" * 64, class_id=None, class_name="none", seed=0, cfg=1.5, top_k=900,
    top_p=0.96, smooth=False, device="cuda", dtype="bf16", version="0",
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """A picture on its way into a file."""

    made: Provenance


def whole_pipeline(run: Run, models: Models, batch: int) -> dict[str, object]:
    """Return pictures a second when they are left in memory, and when they become PNG files as `var sample` does it."""
    made = BatchSampler(*models, CONFIG, batch)
    count = 4 * batch

    def bare() -> None:
        for _ in made.pictures(requests(models, count, 0)):
            pass

    def to_files() -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            open_output(folder + "/", several=True) as output,
            Writer(output, lambda item, path: None, 2 * batch) as writer,
        ):
            for wanted, pixels in made.pictures(requests(models, count, 0)):
                item = File(replace(PROVENANCE, seed=wanted.seed))
                writer.put(item, writer.prepare(item, pixels))

    bare(), to_files()
    taken: dict[str, list[float]] = {"to memory": [], "to PNG files": []}
    for _ in range(3):
        taken["to memory"].append(timed(run.device, bare))
        taken["to PNG files"].append(timed(run.device, to_files))
    memory, files = (statistics.median(times) for times in taken.values())
    speeds = {"to memory, pictures/s": round(count / memory, 2), "to PNG files, pictures/s": round(count / files, 2)}
    return {"batch": batch, **speeds, "kept up": round(memory / files, 3)}


def differing(models: Models, together: int) -> dict[str, object]:
    """Return the share of tokens that come out differently when pictures are made together, not one by one."""

    def tokens(wanted: Sequence[Wanted]) -> torch.Tensor:
        rows, seeds = [w.row for w in wanted], [w.seed for w in wanted]
        return torch.cat([r.tokens.cpu() for r in sampler.generate(*models, rows, seeds, CONFIG)], dim=1)

    wanted = requests(models, together, 0)
    changed = tokens(wanted) != torch.cat([tokens([one]) for one in wanted])
    share = changed.float().mean().item()
    return {"together": together, "tokens that differ": round(share, 4), "first scale": changed[:, 0].any().item()}


def decoder_choices(run: Run, models: Models, batch: int) -> dict[str, object]:
    """Return milliseconds a picture in the decoder, with cuDNN's own choice of kernels and with tried ones."""
    config = models[0].config
    f_hat_BCHW = torch.randn(batch, config.codebook_width, config.sides[-1], config.sides[-1], device=run.device)
    found: dict[str, object] = {"batch": batch}
    for tried in (False, True):
        with torch.backends.cudnn.flags(enabled=True, benchmark=tried):
            times = [timed(run.device, lambda: sampler.decode_on_device(models[0], f_hat_BCHW)) for _ in range(6)]
        found["tried kernels, ms" if tried else "own choice, ms"] = round(1e3 * statistics.median(times[2:]) / batch, 3)
    return found


def all_figures(run: Run) -> dict[str, object]:
    """Return everything."""
    sizes = (1, 2) if run.quick else (1, 8, 64, 128, 256)
    largest = sizes[-1] if run.quick else 64
    speed: list[dict] = []
    models = run.models(16)
    for batch in sizes:
        speed += measure(run, "d16", models, batch, main_ways(run, models, batch, 16))
    for batch in (1, largest):
        speed += variants(run, models, batch)
    rest = {
        "pipeline": whole_pipeline(run, models, largest),
        "batches": differing(models, largest),
        "decoder": decoder_choices(run, models, min(largest, 16)),
    }
    del models
    models = run.models(30)
    for batch in (1, largest):
        speed += measure(run, "d30", models, batch, main_ways(run, models, batch, 30))
    machine = {"device": hardware(run.device), "python": platform.python_version(), "torch": torch.__version__}
    asked = {"dtype": run.precision, "quick": run.quick, "config": asdict(CONFIG)}
    rate = statistics.median(row["matmul TFLOP/s"] for row in speed)
    return machine | asked | {"matmul TFLOP/s": rate, "speed": speed} | rest


def main() -> None:
    """Measure and print tables; write everything as JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="where to measure")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), help="the GPU's own choice without it")
    parser.add_argument("--seconds", type=float, default=4, help="for each way at each size of batch")
    parser.add_argument("--quick", action="store_true", help="models of no size, once")
    parser.add_argument("--json", type=Path, help="a file for everything")
    given = parser.parse_args()
    device = pick_device(given.device)
    precision = given.dtype or (pick_dtype("auto", device) if device.type == "cuda" else "bf16")
    begin = time.perf_counter()
    found = all_figures(Run(device, precision, given.quick, 0 if given.quick else given.seconds))
    found["seconds"] = round(time.perf_counter() - begin, 1)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{found['device']}, {precision}, {found['matmul TFLOP/s']} TFLOP/s in plain products\n\n")
    for part in ("speed", "pipeline", "batches", "decoder"):
        rows = found[part]
        print_rows(rows if isinstance(rows, list) else [rows], as_json=False)
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
