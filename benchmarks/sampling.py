"""Seconds per image, compared with the naive sampler (`varcli.sampling.naive`).

    python benchmarks/sampling.py [--checkpoint NAME|FILE] [--rounds 3] [--batches 1,8] [--json]
    python benchmarks/sampling.py --differing 64 [--device cuda] [--checkpoint NAME|FILE] [--json]

Measures the released d16's shape at 256 px with random weights or, if given, a checkpoint. The naive sampler and all
variants are interleaved round by round, so that a machine that is busy for a while slows down all of them. The naive
sampler has neither batches nor 16 bits. The floor is the time the image's arithmetic alone would take at the best rate
this machine reached in a product of two large matrices, in the same round.

With `--differing N` it measures something else: how many tokens differ in 16 bits when N images are sampled in one
batch rather than one by one. A token that differs changes those after it, so images are counted too.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from models import named_models
from tables import print_rows

from varcli.acceleration.devices import check_int8, pick_device
from varcli.acceleration.dispatch import prepare
from varcli.benchmarking.flops import decoder_operations, transformer_operations
from varcli.benchmarking.samplers import BenchRequest, Models
from varcli.benchmarking.timing import matmul_rate
from varcli.config import PRESETS
from varcli.errors import UsageError
from varcli.sampling import naive
from varcli.sampling.batching import BatchSampler
from varcli.sampling.sampler import generate

CONFIG = PRESETS["metrics"]
CPU = torch.device("cpu")


def variants(plain: Models, batches: Sequence[int]) -> dict[tuple[str, str, int], Callable[[int], object]]:
    """Return what is measured, by sampler, precision and batch size, as functions of the first seed."""
    made: dict[tuple[str, str, int], Callable[[int], object]] = {
        ("naive sampler", "fp32", 1): lambda seed: naive.sample(*plain, 0, seed, CONFIG)
    }
    for precision in precisions():
        models = copy.deepcopy(plain)
        prepare(*models, CPU, precision)
        sampler = BatchSampler(*models, CONFIG)
        for count in batches:
            made["varcli", precision, count] = lambda seed, sampler=sampler, count=count: list(
                sampler.images(BenchRequest(0, seed + i) for i in range(count))
            )
    return made


def precisions() -> list[str]:
    """Return the precisions to measure on this processor."""
    try:
        check_int8(CPU)
    except UsageError:
        return ["fp32", "bf16"]
    return ["fp32", "bf16", "int8"]


def operations(models: Models) -> int:
    """Return the floating-point operations per image with guidance, including those that the sampler avoids."""
    counts = [side * side for side in models[1].config.sides]
    transformer = transformer_operations(models[1].config, counts, rows=CONFIG.rows)
    return sum(transformer) + decoder_operations(models[0].config)


def measure(models: Models, batches: Sequence[int], rounds: int) -> list[dict[str, object]]:
    """Return one row per variant: medians over the rounds of seconds per image, and ratios within a round.

    The floor is the time an image's operations take at the best rate of a matrix product in that precision (bf16 for
    int8), measured in the same round.
    """
    runs, work = variants(models, batches), operations(models)
    seconds: dict[tuple[str, str, int], list[float]] = {key: [] for key in runs}
    floors: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for turn in range(rounds + 1):
        for precision in floors if turn > 0 else ():
            floors[precision].append(work / matmul_rate(CPU, precision))
        for key, make in runs.items():
            if turn == 0 and key[2] > 1:
                continue  # the warm-up round needs no batches
            start = time.perf_counter()
            make(turn * 8)
            if turn > 0:
                seconds[key].append((time.perf_counter() - start) / key[2])
    naive_seconds = seconds["naive sampler", "fp32", 1]
    rows = []
    for (sampler, precision, batch), taken in seconds.items():
        floor = floors["fp32" if precision == "fp32" else "bf16"]
        rows.append(
            {
                "sampler": sampler,
                "precision": precision,
                "batch": batch,
                "seconds per image": round(statistics.median(taken), 3),
                "times faster": round(median_ratio(naive_seconds, taken), 2),
                "floor, seconds": round(statistics.median(floor), 3),
                "% of the floor": round(100 * median_ratio(floor, taken)),
            }
        )
    return rows


def median_ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """Return the median over the rounds of one figure divided by another of the same round."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def differing(plain: Models, batch: int, device: torch.device) -> list[dict[str, object]]:
    """Return one row per precision: the fractions of tokens and images that a batch of this size changes."""
    rows: list[dict[str, object]] = []
    for precision in ("bf16", "fp16"):
        models = copy.deepcopy(plain)
        prepare(*models, device, precision)
        batched = tokens(models, range(batch))
        alone = torch.cat([tokens(models, [seed]) for seed in range(batch)])
        changed = batched != alone
        rows.append(
            {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
                "precision": precision,
                "batch": batch,
                "tokens that differ": round(changed.float().mean().item(), 4),
                "images that differ": round(changed.any(dim=1).float().mean().item(), 4),
            }
        )
    return rows


def tokens(models: Models, seeds: Sequence[int]) -> torch.Tensor:
    """Return the tokens (B, L) of one image per seed, sampled in one batch; the classes take turns."""
    classes = models[1].config.class_count
    results = generate(*models, [seed % classes for seed in seeds], seeds, CONFIG)
    return torch.cat([result.tokens.cpu() for result in results], dim=1)


def main() -> None:
    """Measure and print a Markdown table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="name or file; without it the d16's shape with random weights")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--batches", default="1,8", help="batch sizes")
    parser.add_argument("--differing", type=int, metavar="N", help="instead count the tokens that a batch of N changes")
    parser.add_argument("--device", default="auto", help="where to count them (--differing)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    given = parser.parse_args()
    name, models = named_models(given.checkpoint)
    if given.differing:
        rows = differing(models, given.differing, pick_device(given.device))
    else:
        rows = measure(models, [int(count) for count in given.batches.split(",")], given.rounds)
    print_rows([{"model": name} | row for row in rows], as_json=given.json)


if __name__ == "__main__":
    main()
