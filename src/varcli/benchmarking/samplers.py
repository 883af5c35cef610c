"""The ways to make an image that are measured: varcli's own, and what it is compared with.

Each makes the same images of the same classes and tells when a phase of the work ends.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from varcli.acceleration.cuda_graphs import GraphRunner
from varcli.benchmarking.flops import decoder_operations, transformer_operations
from varcli.benchmarking.raster import scan
from varcli.config import SampleConfig
from varcli.errors import RunError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling import naive
from varcli.sampling.batching import BatchSampler, not_recorded
from varcli.sampling.sampler import EAGER, Pixels, decode

Models = tuple[Tokenizer, Transformer]
Mark = Callable[[str], None]
Note = Callable[[str], None]


def _silent(line: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSampler:
    """One way to make images."""

    name: str
    precision: str
    batch: int
    """Images at a time."""
    steps: Sequence[str]
    """What each step of the transformer is called; those of the same name count as one."""
    operations: Mapping[tuple[str, str], int]
    """Floating-point operations an image, by phase and step."""
    make: Callable[[Sequence[int], Mark], Sequence[Pixels]]
    """Makes one image (P, P, 3) a seed, and marks the end of each "transformer", "drawing" and "decoder"."""
    recorded: Callable[[], bool] = lambda: False
    """Tells whether its steps are CUDA graphs, or are going to be after the first batch."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image to be made."""

    label: int
    seed: int


def varcli(models: Models, config: SampleConfig, precision: str, batch: int, note: Note = _silent) -> BenchSampler:
    """Return the sampler of `var sample`, for models made ready by `devices.place`."""
    sampler = BatchSampler(*models, config, batch, note)
    together = sampler.batch_size

    def make(seeds: Sequence[int], mark: Mark) -> Sequence[Pixels]:
        sampler.mark = mark
        wanted = [Wanted(row, seed) for row, seed in zip(_rows(models, seeds), seeds, strict=True)]
        pixels = [found for _, found in sampler.images(wanted)]
        mark("decoder")
        if sampler.batch_size != together:
            raise RunError(f"memory: {together} images at a time; --batch-size {sampler.batch_size} fits")
        return pixels

    return BenchSampler(
        name="varcli",
        precision=precision,
        batch=together,
        make=make,
        recorded=lambda: sampler.recorder is not None,
        **_scales(models, config),
    )


def raster_scan(models: Models, config: SampleConfig, precision: str, batch: int, note: Note = _silent) -> BenchSampler:
    """Return the raster-scan baseline, for the same models, its steps recorded where varcli's are."""
    sampler = BatchSampler(*models, config, batch)
    runner = (
        None if sampler.recorder is None else GraphRunner(sampler.recorder(), lambda error: note(not_recorded(error)))
    )

    def make(seeds: Sequence[int], mark: Mark) -> Sequence[Pixels]:
        f_BCHW = scan(*models, _rows(models, seeds), seeds, config, mark=mark, runner=runner or EAGER)
        pixels_BPP3 = decode(models[0], f_BCHW)
        mark("decoder")
        return list(pixels_BPP3)

    tokens = models[1].config.sides[-1] ** 2
    steps = {f"{tokens} tokens": [1] * tokens}
    return BenchSampler(
        name="raster",
        precision=precision,
        batch=sampler.batch_size,
        make=make,
        recorded=lambda: runner is not None and runner.recording,
        **_work(models, config, steps),
    )


def naive_sampler(models: Models, config: SampleConfig) -> BenchSampler:
    """Return the sampler's specification: images one by one in float32, with models as they were loaded."""

    def make(seeds: Sequence[int], mark: Mark) -> Sequence[Pixels]:
        found: list[Pixels] = []
        for row, seed in zip(_rows(models, seeds), seeds, strict=True):
            _, pixels_PP3 = naive.sample(*models, row, seed, config, mark=mark)
            found.append(pixels_PP3.cpu().numpy())
            mark("decoder")
        return found

    return BenchSampler(name="plain", precision="fp32", batch=1, make=make, **_scales(models, config))


def _scales(models: Models, config: SampleConfig) -> dict[str, Any]:
    """Return what is done by who makes a scale a step. The plain twin does more, none of which is needed."""
    return _work(models, config, {f"{side} × {side}": [side * side] for side in models[1].config.sides})


def _work(models: Models, config: SampleConfig, steps: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return a contestant's steps and operations, given the tokens of the steps of each name."""
    names = [name for name, counts in steps.items() for _ in counts]
    counts = [count for counts in steps.values() for count in counts]
    operations = Counter[tuple[str, str]]()
    for name, needed in zip(names, transformer_operations(models[1].config, counts, config.cfg > 0), strict=True):
        operations["transformer", name] += needed
    operations["decoder", ""] = decoder_operations(models[0].config)
    return {"steps": names, "operations": operations}


def _rows(models: Models, seeds: Sequence[int]) -> list[int]:
    """Return a row of the class table an image: the classes take turns."""
    return [seed % models[1].config.class_count for seed in seeds]
