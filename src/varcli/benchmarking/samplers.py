"""The samplers that are benchmarked: varcli's own, and those it is compared with.

Each samples images of the same classes from the same seeds, and marks when a phase of the work ends.

Shapes: B images, R rows of the transformer's batch, l tokens, D width, C codebook channels, V codebook rows, P pixels.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from varcli.acceleration.cuda_graphs import GraphRunner, Runner
from varcli.acceleration.devices import block_weight
from varcli.benchmarking.flops import decoder_operations, transformer_operations
from varcli.config import SampleConfig
from varcli.errors import RunError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling import naive
from varcli.sampling.batching import BatchSampler, not_captured
from varcli.sampling.sampler import EAGER, Pixels, decode
from varcli.sampling.scale_model import ScaleModel
from varcli.sampling.token_sampling import candidates, generators, sample_tokens, uniforms

Models = tuple[Tokenizer, Transformer]
Mark = Callable[[str], None]
Note = Callable[[str], None]


def _silent(line: str) -> None:
    """Ignore the phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSampler:
    """One way to sample images."""

    name: str
    precision: str
    batch: int
    """Images at a time."""
    steps: Sequence[str]
    """What each step of the transformer is called; those of the same name count as one."""
    operations: Mapping[tuple[str, str], int]
    """Floating-point operations per image, by phase and step."""
    make: Callable[[Sequence[int], Mark], Sequence[Pixels]]
    """Samples one image (P, P, 3) per seed, and marks the end of each "transformer", "token sampling" and "decoder"."""
    cuda_graphs: Callable[[], bool] = lambda: False
    """Whether its steps are CUDA graphs, or will be after the first batch."""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """An image to be sampled."""

    label: int
    seed: int


def varcli(models: Models, config: SampleConfig, precision: str, batch: int, note: Note = _silent) -> BenchSampler:
    """Return the sampler of `var sample`, for models that `dispatch.prepare` made ready."""
    sampler = BatchSampler(*models, config, batch, note)
    together = sampler.batch_size

    def make(seeds: Sequence[int], mark: Mark) -> Sequence[Pixels]:
        sampler.mark = mark
        wanted = [BenchRequest(label, seed) for label, seed in zip(_labels(models, seeds), seeds, strict=True)]
        pixels = [found for _, found in sampler.images(wanted)]
        mark("decoder")
        if sampler.batch_size != together:
            raise RunError(
                f"{together} images at a time do not fit into memory; --batch-size {sampler.batch_size} does"
            )
        return pixels

    return BenchSampler(
        name="varcli",
        precision=precision,
        batch=together,
        make=make,
        cuda_graphs=lambda: sampler.new_capture is not None,
        **_scales(models, config),
    )


def naive_sampler(models: Models, config: SampleConfig) -> BenchSampler:
    """Return the sampler's specification: images one by one in float32, with models as they were loaded."""

    def make(seeds: Sequence[int], mark: Mark) -> Sequence[Pixels]:
        found: list[Pixels] = []
        for label, seed in zip(_labels(models, seeds), seeds, strict=True):
            _, pixels_PP3 = naive.sample(*models, label, seed, config, mark=mark)
            found.append(pixels_PP3.cpu().numpy())
            mark("decoder")
        return found

    return BenchSampler(name="naive", precision="fp32", batch=1, make=make, **_scales(models, config))


def _scales(models: Models, config: SampleConfig) -> dict[str, Any]:
    """Steps and operations of a sampler with one step per scale. The naive one does more, none of it needed."""
    return _work(models, config, {f"{side} × {side}": [side * side] for side in models[1].config.sides})


def _work(models: Models, config: SampleConfig, steps: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return a sampler's steps and operations, given the tokens of the steps of each name."""
    names = [name for name, counts in steps.items() for _ in counts]
    counts = [count for counts in steps.values() for count in counts]
    operations = Counter[tuple[str, str]]()
    for name, needed in zip(names, transformer_operations(models[1].config, counts, config.rows), strict=True):
        operations["transformer", name] += needed
    operations["decoder", ""] = decoder_operations(models[0].config)
    return {"steps": names, "operations": operations}


def _labels(models: Models, seeds: Sequence[int]) -> list[int]:
    """Return one label per image: the classes take turns."""
    return [seed % models[1].config.class_count for seed in seeds]


# --- raster scan -----------------------------------------------------------------------------------


def raster_scan(models: Models, config: SampleConfig, precision: str, batch: int, note: Note = _silent) -> BenchSampler:
    """Return the raster-scan baseline, for the same models, captured as CUDA graphs where varcli's is."""
    sampler = BatchSampler(*models, config, batch)
    runner = (
        None
        if sampler.new_capture is None
        else GraphRunner(sampler.new_capture(), lambda error: note(not_captured(error)))
    )

    def make(seeds: Sequence[int], mark: Mark) -> Sequence[Pixels]:
        f_BCHW = scan(*models, _labels(models, seeds), seeds, config, mark=mark, runner=runner or EAGER)
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
        cuda_graphs=lambda: runner is not None and runner.capturing,
        **_work(models, config, steps),
    )


class RasterModel:
    """The transformer at work on one batch, token by token."""

    def __init__(self, transformer: Transformer, label_B: Tensor, config: SampleConfig) -> None:
        self.transformer = transformer
        # The cache may leave out the last scale, which no other looks at; here each token looks at those before it.
        side = transformer.config.sides[-1]
        self.work = ScaleModel(transformer, label_B, config, sides=(1, side, side + 1))

    def logits(self, position: int, input_B1C: Tensor | None) -> Tensor:
        """Return the guided logits (B, 1, V) of a token, after those of all before it.

        Args:
            position: of the token.
            input_B1C: codebook rows of the token before it; None before the first.
        """
        self.work.cache.filled = position
        return self.head(self.work.normalized(self.work.through_blocks(self.inputs(position, input_B1C))))

    def inputs(self, first: int, input_BlC: Tensor | None) -> Tensor:
        """Return the residual stream (R, l, D) of tokens from position `first` on, given those before each.

        Before the first token of all there is none (None): the class stands there.
        """
        if input_BlC is None:
            x_RlD = self.work.class_RD.unsqueeze(1) + self.transformer.pos_start
        else:
            x_RlD = self.transformer.word_embed(input_BlC).repeat(len(self.work.class_RD) // self.work.count, 1, 1)
        return x_RlD + self.transformer.pos_1LC[:, first : first + x_RlD.shape[1]]

    def head(self, h_RlD: Tensor) -> Tensor:
        """Return the guided logits (B, l, V) of what the blocks give; the strength is the same everywhere."""
        last_scale = len(self.transformer.config.sides) - 1
        logits_BlV: Tensor = self.transformer.head(self.work.guide(h_RlD, last_scale))
        return logits_BlV


@torch.inference_mode()
def scan(
    tokenizer: Tokenizer,
    transformer: Transformer,
    labels: Sequence[int],
    seeds: Sequence[int],
    config: SampleConfig,
    *,
    mark: Callable[[str], None] = lambda phase: None,
    runner: Runner = EAGER,
) -> Tensor:
    """Return the feature maps (B, C, H, W) of a batch of images drawn in raster order.

    Args:
        tokenizer: as for `sampler.generate`.
        transformer: the same.
        labels: index of each image's class in the class table.
        seeds: one seed per image.
        config: guidance and filters.
        mark: called with "transformer" and "token sampling" after these phases of each token.
        runner: how to run the steps.
    """
    device, length = block_weight(transformer).device, transformer.config.sides[-1] ** 2
    label_B = runner.copy_in("labels", torch.tensor(labels), device)
    u_Bl = runner.copy_in("numbers", uniforms(generators(seeds, labels), length), device)
    model = runner.run("class", lambda: RasterModel(transformer, label_B, config))
    drawn: list[Tensor] = []
    input_B1C = None
    for position in range(length):
        logits_B1V = runner.run(f"transformer {position}", partial(model.logits, position, input_B1C))
        mark("transformer")
        u_B1 = u_Bl[:, position : position + 1]
        draw = partial(_draw, tokenizer, config, logits_B1V, u_B1)
        idx_B1, input_B1C = runner.run(f"token sampling {position}", draw)
        drawn.append(idx_B1)
        mark("token sampling")
    return tokenizer.quantize.embed(torch.cat(drawn, dim=1))


def _draw(tokenizer: Tokenizer, config: SampleConfig, logits_B1V: Tensor, u_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token and its codebook row, (B, 1) and (B, 1, C)."""
    idx_B1 = sample_tokens(candidates(logits_B1V, config.top_k, config.top_p), u_B1)
    return idx_B1, tokenizer.quantize.embedding(idx_B1)
