"""Training speed of `var train transformer` on a GPU, with each of its options for speed."""

import gc
import statistics
from functools import partial

import torch
from gpu_log import Row
from gpu_parts import timed, tried
from gpu_ways import Run, random_models

from varcli.acceleration.devices import free_memory
from varcli.acceleration.flex_attention import use_flex_attention
from varcli.benchmarking.flops import transformer_operations
from varcli.benchmarking.timing import matmul_rate
from varcli.classes import imagenet
from varcli.config import TransformerTrainingConfig
from varcli.training.loop import update
from varcli.training.transformer import TransformerStage, build_transformer, keep_block_inputs

COMPILE, FLEX, CHECKPOINT = "--compile", "--flex-attention", "--checkpoint-activations"
WARM_UPS, STEPS = 3, 8
"""The first steps compile and allocate."""


def training(run: Run, part: str, depth: int, batch: int) -> list[Row]:
    """Return a row for each set of options that does not fail, the first without any.

    MFU counts three times the operations of the forward pass; the aim is 40 %. The weights and tokens are random.
    """
    ways: list[tuple[str, ...]] = [()]
    if run.device.type == "cuda":  # a processor compiles for minutes, and has no backward pass of FlexAttention
        ways += [(COMPILE,), (FLEX,), (COMPILE, FLEX), (CHECKPOINT,), (COMPILE, CHECKPOINT)]
    rows: list[Row] = []
    for options in ways:
        name = " ".join(("var train", *options))
        tried(run, f"{part}: {name}", partial(measure, run, depth, batch, options, rows))
        gc.collect()
        free_memory(run.device)
    return [{"model": f"d{depth}", "batch": batch} | row for row in rows]


def measure(run: Run, depth: int, batch: int, options: tuple[str, ...], rows: list[Row]) -> None:
    """Add the row of a set of options."""
    tokenizer, shape = random_models(depth, run.quick)
    config = shape.config
    recipe = TransformerTrainingConfig(batch=batch)
    torch.compiler.reset()
    stage = TransformerStage(
        build_transformer(config, recipe).to(run.device), recipe, tokenizer, imagenet(), bf16=run.precision == "bf16"
    )
    if FLEX in options:
        use_flex_attention(stage.model)
    if CHECKPOINT in options:
        keep_block_inputs(stage.model)
    for block in stage.model.blocks if COMPILE in options else ():
        block.compile()
    data = (torch.randint(config.codebook_size, (batch, config.length)), torch.randint(config.class_count, (batch,)))
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    seconds = [timed(run.device, partial(update, stage, data, step, 10**6)) for step in range(WARM_UPS + STEPS)]
    median = statistics.median(seconds[WARM_UPS:])
    operations = 3 * sum(transformer_operations(config, [side * side for side in config.sides], rows=1))
    peak = round(torch.cuda.max_memory_allocated(run.device) / 1e9, 2) if run.device.type == "cuda" else None
    rows.append(
        {
            "options": " ".join(options) or "none",
            "images/s": round(batch / median, 1),
            "MFU": round(batch * operations / median / matmul_rate(run.device, run.precision), 3),
            "peak GB": peak,
        }
    )
