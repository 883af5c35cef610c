"""The ways to make images that `gpu.py` measures, and the models they make them with."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from gpu_book import Book

from varcli.acceleration import dispatch
from varcli.acceleration.cuda_blocks import GpuBlock
from varcli.acceleration.dispatch import prepare
from varcli.benchmarking.samplers import Models, Wanted, raster_scan
from varcli.checkpoints.random_init import randomized, shapes
from varcli.config import APPROXIMATIONS, PRESETS, SampleConfig
from varcli.models.autoencoder import NormSilu
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import KeyValueCache
from varcli.sampling import naive, scale_model
from varcli.sampling.batching import BatchSampler

CONFIG = PRESETS["metrics"]
Make = Callable[[int, int], None]
"""Makes so many images, from a seed on."""


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
    book: Book
    """Where everything goes."""

    def models(self, depth: int, precision: str | None = None) -> Models:
        """Return models of a released shape, or of none for a quick run, with random weights, prepared."""
        models = random_models(depth, self.quick)
        prepare(*models, self.device, precision or self.precision)
        return models


def random_models(depth: int, quick: bool) -> Models:
    """Return models of a released shape with random weights."""
    tokenizer, transformer = shapes(f"var-d{depth}")
    if quick:
        sides, size = (1, 2, 4), 64
        tokenizer = replace(tokenizer, base_width=32, multipliers=(1, 1), sides=sides, codebook_size=size)
        transformer = replace(transformer, depth=2, width=64, sides=sides, codebook_size=size)
    return randomized(tokenizer, transformer)


@contextmanager
def plain_blocks() -> Iterator[None]:
    """Sample with the transformer's own blocks."""
    with mock.patch.object(scale_model, "fastest_blocks", lambda transformer: (transformer, KeyValueCache)):
        yield


@contextmanager
def torch_operations(tokenizer: Tokenizer) -> Iterator[None]:
    """Sample without Triton's kernels."""
    norms = [part for part in tokenizer.decoder.modules() if isinstance(part, NormSilu)]
    with ExitStack() as patches:
        for norm in norms:
            patches.enter_context(mock.patch.object(norm, "kernel", None))
        patches.enter_context(mock.patch.object(dispatch, "gpu_block", lambda device, dtype: GpuBlock))
        yield


def requests(models: Models, count: int, first: int) -> list[Wanted]:
    """Return so many images, the classes taking turns."""
    return [Wanted(seed % models[1].config.class_count, seed) for seed in range(first, first + count)]


def sampling(run: Run, models: Models, batch: int, config: SampleConfig = CONFIG, graphs: bool = True) -> Make:
    """Return what makes images as `var sample` does, with or without graphs."""
    used = BatchSampler(*models, config, batch, run.book.told)
    used.new_capture = used.new_capture if graphs else None

    def make(count: int, first: int) -> None:
        for _ in used.images(requests(models, count, first)):
            pass
        if used.batch_size < batch and models[1].pos_start.is_cuda:
            raise TooLargeError(f"memory holds {used.batch_size} images at a time")

    return make


def sampling_plainly(run: Run, models: Models, batch: int) -> Make:
    """Return the same without fused blocks."""
    eager = sampling(run, models, batch, graphs=False)

    def make(count: int, first: int) -> None:
        with plain_blocks():
            eager(count, first)

    return make


def sampling_by_torch(run: Run, models: Models, batch: int) -> Make:
    """Return what makes images with graphs of torch's operations alone."""
    recorded = sampling(run, models, batch)

    def make(count: int, first: int) -> None:
        with torch_operations(models[0]):
            recorded(count, first)

    return make


def twin(run: Run, depth: int) -> Make:
    """Return the plain twin, whose models are made when it is first needed."""
    kept: list[Models] = []

    def make(count: int, first: int) -> None:
        if not kept:
            tokenizer, transformer = random_models(depth, run.quick)
            kept.append((tokenizer.to(run.device), transformer.to(run.device)))
        for wanted in requests(kept[0], count, first):
            naive.sample(*kept[0], wanted.label, wanted.seed, CONFIG)[1].cpu()

    return make


def raster(run: Run, models: Models, batch: int) -> Make:
    """Return the baseline in raster order."""
    sampler = raster_scan(models, CONFIG, run.precision, batch, run.book.told)

    def make(count: int, first: int) -> None:
        for seed in range(first, first + count, sampler.batch):
            sampler.make(range(seed, seed + sampler.batch), lambda phase: None)

    return make


def main_ways(run: Run, models: Models, batch: int, depth: int) -> dict[str, Make]:
    """Return what `var sample` does, and from there to the specification, which is too slow for batches."""
    found = {
        "recorded": sampling(run, models, batch),
        "no Triton": sampling_by_torch(run, models, batch),
        "eager": sampling(run, models, batch, graphs=False),
        "plain blocks": sampling_plainly(run, models, batch),
    }
    return found | ({"plain twin": twin(run, depth)} if batch == 1 and depth == 16 else {})


def other_ways(run: Run, models: Models, batch: int) -> dict[str, Callable[[], Make]]:
    """Return what prepares int8, each approximation and the raster baseline; int8 may be missing."""
    found: dict[str, Callable[[], Make]] = {"int8": lambda: sampling(run, run.models(16, "int8"), batch)}
    for approximate in APPROXIMATIONS:
        found[f"approximate {approximate}"] = partial(
            sampling, run, models, batch, replace(CONFIG, approximate=approximate)
        )
    found["raster"] = lambda: raster(run, models, batch)
    return found
