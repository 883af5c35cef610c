"""Seconds a picture, and pictures a second, against the plain twin in `varcli.sampling.plain`.

    python benchmarks/sampling.py [--checkpoint NAME|FILE] [--rounds 3] [--json]
    python benchmarks/sampling.py --differing 64 [--device cuda] [--checkpoint NAME|FILE] [--json]

Measures the released d16's shape at 256 px with random weights or, given one, a checkpoint. The twin
and all variants take turns in every round, so that a machine that is busy for a while is so for all of
them. The twin knows no batches and no 16 bits.

With `--differing N` it measures something else: how many tokens come out differently in 16 bits when N
pictures are made together rather than one by one. One token drawn differently changes those after it, so
that pictures are counted too.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tables import print_rows

from varcli.checkpoints.registry import find
from varcli.checkpoints.store import load_model, without_initialization
from varcli.config import PRESETS, TokenizerConfig, TransformerConfig
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.batches import BatchSampler
from varcli.sampling.devices import pick_device, place
from varcli.sampling.plain import sample as plain_sample
from varcli.sampling.sampler import generate
from varcli.scales import GRID_256

CONFIG = PRESETS["metrics"]
CPU = torch.device("cpu")
Models = tuple[Tokenizer, Transformer]


@dataclass(frozen=True)
class Wanted:
    """A picture to be made."""

    row: int
    seed: int


def random_d16() -> Models:
    """Return models of the released d16's shape; random weights cost what trained ones cost."""
    shape = TransformerConfig(depth=16, width=1024, sides=GRID_256, codebook_size=4096, codebook_width=32)
    with without_initialization():
        tokenizer, transformer = Tokenizer(TokenizerConfig()), Transformer(shape)
    with torch.no_grad():
        for parameter in [*tokenizer.parameters(), *transformer.parameters()]:
            parameter.normal_(0, 0.02)
    return tokenizer.eval(), transformer.eval()


def variants(plain: Models) -> dict[tuple[str, str, int], Callable[[int], object]]:
    """Return what is measured: (sampler, precision, pictures at a time) and what makes those pictures."""
    made: dict[tuple[str, str, int], Callable[[int], object]] = {
        ("plain twin", "fp32", 1): lambda seed: plain_sample(*plain, 0, seed, CONFIG)
    }
    for precision in ("fp32", "bf16"):
        models = copy.deepcopy(plain)
        place(*models, CPU, precision)
        sampler = BatchSampler(*models, CONFIG)
        for count in (1, 8):
            made["varcli", precision, count] = lambda seed, sampler=sampler, count=count: list(
                sampler.pictures(Wanted(0, seed + i) for i in range(count))
            )
    return made


def measure(models: Models, rounds: int) -> list[dict[str, object]]:
    """Return one row a variant: median seconds a picture, pictures a second, and how much faster than the twin."""
    runs = variants(models)
    seconds: dict[tuple[str, str, int], list[float]] = {key: [] for key in runs}
    for turn in range(rounds + 1):
        for key, make in runs.items():
            if turn == 0 and key[2] > 1:
                continue  # the round that warms up needs no batches
            start = time.perf_counter()
            make(turn * 8)
            if turn > 0:
                seconds[key].append((time.perf_counter() - start) / key[2])
    medians = {key: statistics.median(taken) for key, taken in seconds.items()}
    twin = medians["plain twin", "fp32", 1]
    return [
        {
            "sampler": sampler,
            "precision": precision,
            "batch": batch,
            "seconds a picture": round(median, 3),
            "pictures/s": round(1 / median, 3),
            "times the twin": round(twin / median, 2),
        }
        for (sampler, precision, batch), median in medians.items()
    ]


def differing(plain: Models, together: int, device: torch.device) -> list[dict[str, object]]:
    """Return one row a precision: the shares of tokens and pictures that a batch of this many changes."""
    rows: list[dict[str, object]] = []
    for precision in ("bf16", "fp16"):
        models = copy.deepcopy(plain)
        place(*models, device, precision)
        at_once = tokens(models, range(together))
        alone = torch.cat([tokens(models, [seed]) for seed in range(together)])
        changed = at_once != alone
        rows.append(
            {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
                "precision": precision,
                "together": together,
                "tokens that differ": round(changed.float().mean().item(), 4),
                "pictures that differ": round(changed.any(dim=1).float().mean().item(), 4),
            }
        )
    return rows


def tokens(models: Models, seeds: Sequence[int]) -> torch.Tensor:
    """Return the tokens (B, L) of one picture a seed, made together; the class changes with the seed."""
    classes = models[1].config.class_count
    results = generate(*models, [seed % classes for seed in seeds], seeds, CONFIG)
    return torch.cat([result.tokens.cpu() for result in results], dim=1)


def main() -> None:
    """Measure and print a Markdown table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="name or file; without it the d16's shape with random weights")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--differing", type=int, metavar="N", help="count tokens that a batch of N changes instead")
    parser.add_argument("--device", default="auto", help="where to count them")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    given = parser.parse_args()
    if given.checkpoint:
        checkpoint = load_model(find(given.checkpoint))
        models = (checkpoint.tokenizer, checkpoint.transformer)
    else:
        models = random_d16()
    if given.differing:
        rows = differing(models, given.differing, pick_device(given.device))
    else:
        rows = measure(models, given.rounds)
    name = given.checkpoint or "d16 at 256 px"
    print_rows([{"model": name} | row for row in rows], as_json=given.json)


if __name__ == "__main__":
    main()
