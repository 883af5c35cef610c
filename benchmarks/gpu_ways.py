"""The ways to sample images that `gpu.py` measures, and their models."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from gpu_log import Log

from varcli.acceleration import dispatch
from varcli.acceleration.cuda_blocks import GpuBlock
from varcli.acceleration.dispatch import prepare
from varcli.benchmarking.samplers import BenchRequest, Models, raster_scan
from varcli.checkpoints.random_init import randomized, shapes
from varcli.config import APPROXIMATIONS, PRESETS, SampleConfig
from varcli.models.autoencoder import NormSilu
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import KeyValueCache
from varcli.sampling import naive, scale_model
from varcli.sampling.batching import BatchSampler

CONFIG = PRESETS["metrics"]
Make = Callable[[int, int], None]
"""Samples images: their number, and the first seed."""


class TooLargeError(Exception):
    """A batch does not fit into this GPU's memory."""


@dataclass(frozen=True)
class Run:
    """What is measured, where, and for how long."""

    device: torch.device
    precision: str
    quick: bool
    seconds: float
    """For each way at each batch size, but at least three rounds."""
    log: Log

    def models(self, depth: int, precision: str | None = None) -> Models:
        """Return models of a released shape, or tiny ones for a quick run, with random weights, prepared."""
        models = random_models(depth, self.quick)
        prepare(*models, self.device, precision or self.precision)
        return models


def random_models(depth: int, quick: bool) -> Models:
    """Return models of a released shape, or tiny ones for a quick run, with random weights."""
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
    """Sample without Triton kernels."""
    norms = [part for part in tokenizer.decoder.modules() if isinstance(part, NormSilu)]
    with ExitStack() as patches:
        for norm in norms:
            patches.enter_context(mock.patch.object(norm, "kernel", None))
        patches.enter_context(mock.patch.object(dispatch, "gpu_block", lambda device, dtype: GpuBlock))
        yield


def requests(models: Models, count: int, first: int) -> list[BenchRequest]:
    """Return requests for this many images; the classes take turns."""
    return [BenchRequest(seed % models[1].config.class_count, seed) for seed in range(first, first + count)]


def sampling(run: Run, models: Models, batch: int, config: SampleConfig = CONFIG, graphs: bool = True) -> Make:
    """Return the sampler of `var sample`, with or without CUDA graphs."""
    used = BatchSampler(*models, config, batch, run.log.note)
    used.new_capture = used.new_capture if graphs else None

    def make(count: int, first: int) -> None:
        for _ in used.images(requests(models, count, first)):
            pass
        if used.batch_size < batch and models[1].pos_start.is_cuda:
            raise TooLargeError(f"memory holds {used.batch_size} images at a time")

    return make


def sampling_plainly(run: Run, models: Models, batch: int) -> Make:
    """Return the sampler of `var sample` without CUDA graphs and fused blocks."""
    eager = sampling(run, models, batch, graphs=False)

    def make(count: int, first: int) -> None:
        with plain_blocks():
            eager(count, first)

    return make


def sampling_by_torch(run: Run, models: Models, batch: int) -> Make:
    """Return the sampler of `var sample` with CUDA graphs, but without Triton kernels."""
    captured = sampling(run, models, batch)

    def make(count: int, first: int) -> None:
        with torch_operations(models[0]):
            captured(count, first)

    return make


def naive_sampler(run: Run, depth: int) -> Make:
    """Return the naive sampler, whose models are created when it is first called."""
    kept: list[Models] = []

    def make(count: int, first: int) -> None:
        if not kept:
            tokenizer, transformer = random_models(depth, run.quick)
            kept.append((tokenizer.to(run.device), transformer.to(run.device)))
        for wanted in requests(kept[0], count, first):
            naive.sample(*kept[0], wanted.label, wanted.seed, CONFIG)[1].cpu()

    return make


def raster(run: Run, models: Models, batch: int) -> Make:
    """Return the raster-scan baseline."""
    sampler = raster_scan(models, CONFIG, run.precision, batch, run.log.note)

    def make(count: int, first: int) -> None:
        for seed in range(first, first + count, sampler.batch):
            sampler.make(range(seed, seed + sampler.batch), lambda phase: None)

    return make


def main_ways(run: Run, models: Models, batch: int, depth: int) -> dict[str, Make]:
    """Return the sampler of `var sample`, with ever fewer optimizations, and the naive one, too slow for batches."""
    found = {
        "captured": sampling(run, models, batch),
        "no Triton": sampling_by_torch(run, models, batch),
        "eager": sampling(run, models, batch, graphs=False),
        "plain blocks": sampling_plainly(run, models, batch),
    }
    return found | ({"naive": naive_sampler(run, depth)} if batch == 1 and depth == 16 else {})


def other_ways(run: Run, models: Models, batch: int) -> dict[str, Callable[[], Make]]:
    """Return what prepares int8, each approximation and the raster baseline; int8 may be unsupported."""
    found: dict[str, Callable[[], Make]] = {"int8": lambda: sampling(run, run.models(16, "int8"), batch)}
    for approximate in APPROXIMATIONS:
        found[f"approximate {approximate}"] = partial(
            sampling, run, models, batch, replace(CONFIG, approximate=approximate)
        )
    found["raster"] = lambda: raster(run, models, batch)
    return found
