"""Seconds per edit beside seconds per sample with the same settings and seconds per tokenizer encode.

    python benchmarks/editing.py [--checkpoint NAME|FILE] [--rounds 5] [--json]

Measures the released d16's shape at 256 px with random weights or, if given, a checkpoint. All are interleaved round
by round, so that a machine that is busy for a while slows down all of them. The bound is that an edit takes at most
1.15 × a sample plus one encode for each square; it is measured for one hole and for many.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from models import named_models
from sampling import CONFIG, CPU
from tables import print_rows

from varcli.acceleration.dispatch import prepare
from varcli.benchmarking.samplers import BenchRequest, Models
from varcli.images.masks import box_mask
from varcli.images.tiling import plan_squares
from varcli.sampling.batching import BatchSampler
from varcli.sampling.editing import Editor
from varcli.sampling.reconstruction import encode

BOUND = 1.15
HOLES = 50
"""Far apart, each with a square of its own."""


def variants(models: Models) -> dict[str, Callable[[int], object]]:
    """Return what is measured, by name, as functions of a seed."""
    prepare(*models, CPU, "fp32")
    pixels = models[0].config.pixels
    image = np.random.RandomState(0).randint(0, 256, (pixels, pixels, 3)).astype(np.uint8)
    mask = box_mask((pixels // 4, pixels // 4, pixels // 2, 3 * pixels // 4), (pixels, pixels))
    plan = plan_squares(mask, pixels)
    many = np.zeros((pixels, HOLES * pixels, 3), np.uint8), np.zeros((pixels, HOLES * pixels), bool)
    many[1][:4, pixels // 2 :: pixels] = True
    sampler, editor = BatchSampler(*models, CONFIG), Editor(*models, CONFIG)
    return {
        "sample": lambda seed: list(sampler.images([BenchRequest(0, seed)])),
        "encode": lambda _: encode(models[0], image[None]),
        "edit": lambda seed: editor.edit(image, plan, 0, seed),
        "holes": lambda seed: editor.edit(many[0], plan_squares(many[1], pixels), 0, seed),
    }


def measure(models: Models, rounds: int) -> dict[str, object]:
    """Return the median seconds of each, and the edits' as a multiple of the bound."""
    runs = variants(models)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, make in runs.items():
            start = time.perf_counter()
            make(turn)
            if turn > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    bound = BOUND * medians["sample"] + medians["encode"]
    row: dict[str, object] = {f"seconds {name}": round(median, 3) for name, median in medians.items()}
    return row | {
        "bound": round(bound, 3),
        "edit / bound": round(medians["edit"] / bound, 2),
        "holes / bound": round(medians["holes"] / bound / HOLES, 2),
    }


def main() -> None:
    """Measure and print a Markdown table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="name or file; without it the d16's shape with random weights")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    given = parser.parse_args()
    name, models = named_models(given.checkpoint)
    with torch.inference_mode():
        row = {"model": name} | measure(models, given.rounds)
    print_rows([row], as_json=given.json)


if __name__ == "__main__":
    main()
