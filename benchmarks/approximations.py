"""What each approximation of `--approximate` saves and what it costs, against the same model without any.

    python benchmarks/approximations.py [--checkpoint NAME|FILE] [--device cpu] [--dtype fp32] [--images 8] [--json]
    python benchmarks/approximations.py --refiner NAME|FILE|DEPTH   # instead: a refiner from each of the last scales on

Speed: seconds per image, decoding included, interleaved round by round; medians over the rounds. Price, for the last
two scales: how far the logits differ given the same tokens, which were sampled without any approximation (mean
difference in standard deviations of the logits, how often the most likely token is the same, and the KL divergence in
nats), and how many tokens are the same when each samples its own with the same random numbers. Without a checkpoint
the models have the released d16's shape and random weights: right for speed, and little more than noise for the
price.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace

import torch
from models import named_models
from sampling import CONFIG
from tables import print_rows
from torch import Tensor

from varcli.acceleration.devices import pick_device, pick_dtype, synchronize
from varcli.acceleration.dispatch import prepare
from varcli.benchmarking.samplers import BenchRequest, Models
from varcli.checkpoints.random_init import randomized, released_transformer
from varcli.config import APPROXIMATIONS, SampleConfig
from varcli.models.transformer import Transformer
from varcli.sampling.approximations import LATE, ApproximateScaleModel
from varcli.sampling.batching import BatchSampler
from varcli.sampling.sampler import generate
from varcli.sampling.scale_model import ScaleModel

APPROXIMATED = {
    approximate or "none": replace(CONFIG, approximate=approximate)
    for approximate in ("", *APPROXIMATIONS, ",".join(APPROXIMATIONS))
}


@dataclass(frozen=True)
class Price:
    """How the last two scales of one image differ, each figure the mean over their tokens."""

    difference: float
    same_most_likely: float
    divergence: float
    same_sampled: float


def late_logits(model: ScaleModel, inputs: list[Tensor | None]) -> Tensor:
    """Return the logits (N, V) of the last two scales, concatenated."""
    found = [model.logits(scale, given)[0] for scale, given in enumerate(inputs)]
    return torch.cat(found[-LATE:])


@torch.inference_mode()
def price(models: Models, config: SampleConfig, wanted: BenchRequest, refiner: Transformer | None) -> Price:
    """Return what an approximation, or a refiner, costs on one image."""
    tokenizer, transformer = models
    rows, seeds = [wanted.label], [wanted.seed]
    exact = [r.tokens.clone() for r in generate(tokenizer, transformer, rows, seeds, replace(config, approximate=""))]
    near = [r.tokens.clone() for r in generate(tokenizer, transformer, rows, seeds, config, refiner=refiner)]
    lengths = [side * side for side in transformer.config.sides]
    inputs = [None, *tokenizer.quantize.teacher_input(exact).split(lengths[1:], dim=1)]
    late = refiner if refiner is not None and config.refiner else transformer
    ours_NV = late_logits(ApproximateScaleModel(late, rows, config), inputs)
    theirs_NV = late_logits(ScaleModel(transformer, rows, config), inputs)
    if config.refiner:  # the scales before the refiner's are exact
        own = sum(lengths[len(lengths) - LATE : config.refine_from - 1])
        ours_NV[:own] = theirs_NV[:own]
    divergence = torch.nn.functional.kl_div(
        ours_NV.log_softmax(-1), theirs_NV.log_softmax(-1), reduction="batchmean", log_target=True
    )
    same = torch.cat(exact[-LATE:], dim=1) == torch.cat(near[-LATE:], dim=1)
    return Price(
        ((ours_NV - theirs_NV).abs().mean() / theirs_NV.std()).item(),
        (ours_NV.argmax(-1) == theirs_NV.argmax(-1)).float().mean().item(),
        divergence.item(),
        same.float().mean().item(),
    )


Variants = dict[str, SampleConfig]
"""What is measured, by name."""


def refined(transformer: Transformer) -> Variants:
    """Return one setting for each of the last scales, from which on the refiner samples."""
    scales = len(transformer.config.sides)
    configs = {f"refine-from {k}": replace(CONFIG, refiner="it", refine_from=k) for k in range(scales - 3, scales + 1)}
    return {"none": CONFIG} | configs


def speeds(
    models: Models, variants: Variants, images: int, rounds: int, refiner: Transformer | None
) -> dict[str, float]:
    """Return the median seconds per image of each variant."""
    samplers = {name: BatchSampler(*models, config, refiner=refiner) for name, config in variants.items()}
    device = models[1].pos_start.device
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, sampler in samplers.items():
            synchronize(device)
            begin = time.perf_counter()
            for _ in sampler.images(BenchRequest(0, seed) for seed in range(images)):
                pass
            if turn > 0:  # the first round warms up
                taken[name].append((time.perf_counter() - begin) / images)
    return {name: statistics.median(times) for name, times in taken.items()}


def measure(models: Models, images: int, rounds: int, refiner: Transformer | None) -> list[dict[str, object]]:
    """Return one row per variant."""
    variants = refined(models[1]) if refiner is not None else APPROXIMATED
    seconds, classes = speeds(models, variants, images, rounds, refiner), models[1].config.class_count
    rows: list[dict[str, object]] = []
    for name, config in variants.items():
        prices = [price(models, config, BenchRequest(37 * seed % classes, seed), refiner) for seed in range(images)]
        rows.append(
            {
                "approximation": name,
                "seconds per image": round(seconds[name], 4),
                "times faster": round(seconds["none"] / seconds[name], 2),
                "logits differ, std": round(statistics.fmean(p.difference for p in prices), 4),
                "same most likely token": round(statistics.fmean(p.same_most_likely for p in prices), 4),
                "KL": round(statistics.fmean(p.divergence for p in prices), 4),
                "same sampled": round(statistics.fmean(p.same_sampled for p in prices), 4),
            }
        )
    return rows


def main() -> None:
    """Measure and print a Markdown table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="name or file; without it the d16's shape with random weights")
    parser.add_argument("--refiner", help="name or file, or the depth of one with random weights")
    parser.add_argument("--device", default="auto", help="where to measure")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--images", type=int, default=8, help="number of images, in each round and for the price")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    given = parser.parse_args()
    device = pick_device(given.device)
    name, models = named_models(given.checkpoint)
    prepare(*models, device, pick_dtype(given.dtype, device))
    refiner = None
    if given.refiner:
        shape = released_transformer(int(given.refiner), models[0].config.sides) if given.refiner.isdecimal() else None
        others = randomized(models[0].config, shape) if shape else named_models(given.refiner)[1]
        prepare(*others, device, pick_dtype(given.dtype, device))
        refiner = others[1]
    rows = measure(models, given.images, given.rounds, refiner)
    print_rows([{"model": name} | row for row in rows], as_json=given.json)


if __name__ == "__main__":
    main()
