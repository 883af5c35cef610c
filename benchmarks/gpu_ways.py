"""The ways to make pictures that `gpu.py` measures, and the models they make them with."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch

from varcli.benchmarking.contestants import Models, Wanted, raster_scan
from varcli.checkpoints.untrained import randomized, shapes
from varcli.config import DRAFTS, PRESETS, SampleConfig
from varcli.sampling import plain, scale_model
from varcli.sampling.batches import BatchSampler
from varcli.sampling.devices import place

CONFIG = PRESETS["metrics"]
Make = Callable[[int, int], None]
"""Makes so many pictures, from a seed on."""


class TooLargeError(Exception):
    """A batch does not fit into this GPU's memory."""


@dataclass(frozen=True)
class Run:
    """What is measured, where, and for how long."""

    device: torch.device
    precision: str
    quick: bool
    seconds: float
    """For each way at each size of batch, and not less than three rounds."""

    def models(self, depth: int, precision: str | None = None) -> Models:
        """Return models of a released shape, or of none for a quick run, with random weights, in place."""
        models = random_models(depth, self.quick)
        place(*models, self.device, precision or self.precision)
        return models


def random_models(depth: int, quick: bool) -> Models:
    """Return models of a released shape with random weights."""
    tokenizer, transformer = shapes(f"var-d{depth}")
    if quick:
        small = {"sides": (1, 2, 4), "codebook_size": 64}
        tokenizer = replace(tokenizer, base_width=32, multipliers=(1, 1), **small)
        transformer = replace(transformer, depth=2, width=64, **small)
    return randomized(tokenizer, transformer)


@contextmanager
def plain_blocks() -> Iterator[None]:
    """Sample without `models.fused_gpu`."""
    with mock.patch.object(scale_model, "for_gpu", lambda transformer: False):
        yield


def requests(models: Models, count: int, first: int) -> list[Wanted]:
    """Return so many pictures, the classes taking turns."""
    return [Wanted(seed % models[1].config.class_count, seed) for seed in range(first, first + count)]


def told(line: str) -> None:
    """Say what makes a way slower than it might be."""
    sys.stderr.write(f"{line}\n")


def sampling(models: Models, batch: int, config: SampleConfig = CONFIG, graphs: bool = True) -> Make:
    """Return what makes pictures as `var sample` does, with or without graphs."""
    used = BatchSampler(*models, config, batch, told)
    used.recorder = used.recorder if graphs else None

    def make(count: int, first: int) -> None:
        for _ in used.pictures(requests(models, count, first)):
            pass
        if used.batch_size < batch and models[1].pos_start.is_cuda:
            raise TooLargeError

    return make


def sampling_plainly(models: Models, batch: int) -> Make:
    """Return the same without fused blocks."""
    eager = sampling(models, batch, graphs=False)

    def make(count: int, first: int) -> None:
        with plain_blocks():
            eager(count, first)

    return make


def twin(run: Run, depth: int) -> Make:
    """Return the plain twin, whose models are made when it is first needed."""
    kept: list[Models] = []

    def make(count: int, first: int) -> None:
        if not kept:
            tokenizer, transformer = random_models(depth, run.quick)
            kept.append((tokenizer.to(run.device), transformer.to(run.device)))
        for wanted in requests(kept[0], count, first):
            plain.sample(*kept[0], wanted.row, wanted.seed, CONFIG)[1].cpu()

    return make


def raster(run: Run, models: Models, batch: int) -> Make:
    """Return the baseline in raster order."""
    contestant = raster_scan(models, CONFIG, run.precision, batch, told)

    def make(count: int, first: int) -> None:
        for seed in range(first, first + count, contestant.batch):
            contestant.make(range(seed, seed + contestant.batch), lambda phase: None)

    return make


def main_ways(run: Run, models: Models, batch: int, depth: int) -> dict[str, Make]:
    """Return what `var sample` does, and from there to the specification, which is too slow for batches."""
    found = {
        "recorded": sampling(models, batch),
        "eager": sampling(models, batch, graphs=False),
        "plain blocks": sampling_plainly(models, batch),
    }
    return found | ({"plain twin": twin(run, depth)} if batch == 1 and depth == 16 else {})


def other_ways(run: Run, models: Models, batch: int) -> dict[str, Callable[[], Make]]:
    """Return what prepares int8, each draft and the raster baseline, the first failing where there is no int8."""
    found: dict[str, Callable[[], Make]] = {"int8": lambda: sampling(run.models(16, "int8"), batch)}
    for draft in DRAFTS:
        found[f"draft {draft}"] = lambda draft=draft: sampling(models, batch, replace(CONFIG, draft=draft))
    found["raster"] = lambda: raster(run, models, batch)
    return found
