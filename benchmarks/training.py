"""Training speed of `var train` against a plain loop in fp32: images per second of both stages.

    python benchmarks/training.py [--batch-size 16] [--rounds 5] [--threads 2] [--json]
    python benchmarks/training.py --processes   # instead: two gloo processes of one thread each against one of two

The models are of `tiny64`'s shape with random weights, the images random. The plain loop is forward pass, loss,
backward pass and torch's AdamW, all in fp32; a step of `var train` clips, averages the weights and records figures
too. The tokenizer's losses are those of the recipe, with LPIPS (random weights) and a discriminator, or the squared
error and the quantizer's loss alone. All loops are interleaved round by round; figures are medians. Compiling takes
minutes before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tables import print_rows
from torchvision.models import vgg16

from varcli.acceleration.dispatch import compile_networks, prepare_training
from varcli.checkpoints.registry import resolve_checkpoint
from varcli.checkpoints.store import Checkpoint, load_model
from varcli.config import TokenizerTrainingConfig, TransformerTrainingConfig
from varcli.images.dataset import open_images
from varcli.models.perceptual import LPIPS
from varcli.models.tokenizer import quantization_loss
from varcli.training.discriminator import augment, discriminator_loss
from varcli.training.loop import Stage, update
from varcli.training.tokenizer import TokenizerStage, build_tokenizer
from varcli.training.transformer import TransformerStage, build_transformer

Step = Callable[[], object]


def plain_tokenizer(shape: Checkpoint, pixels_B3PP: torch.Tensor, recipe: TokenizerTrainingConfig) -> Step:
    """Return a step of a plain loop on images in [-1, 1]."""
    model, discriminator = build_tokenizer(shape.tokenizer.config, 0)
    perceptual = random_lpips()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-4)

    def step() -> None:
        f_BCHW = model.features(pixels_B3PP)
        quantized = model.quantize.quantize(f_BCHW)
        decoded = model.decode_features(f_BCHW + (quantized.f_hats[-1] - f_BCHW).detach())
        loss = F.mse_loss(decoded, pixels_B3PP)
        if recipe.perceptual_weight:
            loss = loss + perceptual(decoded, pixels_B3PP)
        if recipe.gan:
            discriminator.requires_grad_(False)
            push = -discriminator(augment(decoded)).mean()
            norms = [
                torch.autograd.grad(one, model.decoder.conv_out.weight, retain_graph=True)[0].norm()
                for one in (loss, push)
            ]
            loss = loss + recipe.gan * norms[0] / (norms[1] + 1e-4) * push
            discriminator.requires_grad_(True)
        (loss + quantization_loss(quantized, f_BCHW, recipe.commitment)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if recipe.gan:
            real, fake = augment(pixels_B3PP), augment(decoded.detach())
            discriminator_loss(discriminator(real), discriminator(fake)).backward()
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()

    return step


def random_lpips() -> LPIPS:
    """Return LPIPS with random weights, as the trained ones are not available everywhere."""
    return LPIPS(vgg16(weights=None).features, [torch.rand(1, width, 1, 1) for width in (64, 128, 256, 512, 512)])


def plain_transformer(shape: Checkpoint, tokens_BL: torch.Tensor, label_B: torch.Tensor) -> Step:
    """Return a step of a plain loop on tokens (B, L) and labels (B,)."""
    model = build_transformer(shape.transformer.config, TransformerTrainingConfig()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    lengths = [side * side for side in model.config.sides]

    def step() -> None:
        with torch.no_grad():
            input_BLC = shape.tokenizer.quantize.teacher_input(list(tokens_BL.split(lengths, dim=1)))
        logits_BLV = model(label_B, input_BLC)
        F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


WAYS = {
    "plain loop, fp32": None,
    "var train --dtype fp32": (False, False),
    "var train --dtype bf16": (True, False),
    "var train --dtype bf16 --compile": (True, True),
}
"""The loops of each stage: whether `var train` runs in bf16, and compiled."""


def tokenizer_step(batch: int, way: str, recipe: TokenizerTrainingConfig) -> Step:
    """Return a step of the tokenizer's training on random images."""
    shape = load_model(resolve_checkpoint("tiny64"))
    side = shape.tokenizer.config.pixels
    pixels = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if WAYS[way] is None:
        return plain_tokenizer(shape, pixels / 127.5 - 1, recipe)
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (side, side)).save(Path(folder) / "image.png")
        none = open_images([Path(folder)]).subset([])
    models = build_tokenizer(shape.tokenizer.config, 0)
    stage = TokenizerStage(*models, recipe, none, none, bf16=WAYS[way][0])
    if recipe.perceptual_weight:
        stage.perceptual = random_lpips().to(memory_format=torch.channels_last)
    return ours(stage, (pixels, [[] for _ in range(batch)]), *WAYS[way])


def transformer_step(batch: int, way: str) -> Step:
    """Return a step of the transformer's training on random tokens."""
    shape = load_model(resolve_checkpoint("tiny64"))
    generator, config = torch.Generator().manual_seed(0), shape.transformer.config
    tokens = torch.randint(config.codebook_size, (batch, config.length), generator=generator)
    labels = torch.randint(config.class_count, (batch,), generator=generator)
    if WAYS[way] is None:
        return plain_transformer(shape, tokens, labels)
    recipe = TransformerTrainingConfig(batch=batch)
    model = build_transformer(config, recipe)
    stage = TransformerStage(model, recipe, shape.tokenizer, shape.classes, bf16=WAYS[way][0])
    return ours(stage, (tokens, labels), *WAYS[way])


def ours(stage: Stage, batch: object, bf16: bool, compiled: bool) -> Step:
    """Return a step of `var train`."""
    prepare_training(stage.model, stage.device, bf16=bf16)
    if compiled:
        compile_networks(stage.model, stage.device, getattr(stage, "perceptual", None))
    numbers = count()
    return lambda: update(stage, batch, next(numbers), 10**6)


STAGES: dict[str, Callable[[int, str], Step]] = {
    "tokenizer": lambda batch, way: tokenizer_step(batch, way, TokenizerTrainingConfig(batch=batch, gan_start=0.0)),
    "tokenizer, without LPIPS and discriminator": lambda batch, way: tokenizer_step(
        batch, way, TokenizerTrainingConfig(batch=batch, perceptual_weight=0.0, gan=0.0)
    ),
    "transformer": transformer_step,
}


def take_steps(stage: str, way: str, batch: int, threads: int, turns: Connection) -> None:
    """Take a step for each message received, and answer with its seconds."""
    torch.set_num_threads(threads)
    step = STAGES[stage](batch, way)
    while turns.recv():
        start = time.perf_counter()
        step()
        turns.send(time.perf_counter() - start)


def measure(stages: list[str], batch: int, rounds: int, threads: int) -> list[dict[str, object]]:
    """Return a row for each stage and way: images per second, and how many times faster than the plain loop.

    Each way has its own process, since `var train` changes how its process keeps freed memory.
    """
    rows: list[dict[str, object]] = []
    spawn = get_context("spawn")
    for stage in stages:
        turns: dict[str, Connection] = {}
        processes = []
        for way in WAYS:
            turns[way], there = spawn.Pipe()
            processes.append(spawn.Process(target=take_steps, args=(stage, way, batch, threads, there), daemon=True))
            processes[-1].start()
            there.close()  # so that the end of the process ends the wait for its answer
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds + 2):
            for way, connection in turns.items():
                connection.send(True)
                seconds = connection.recv()
                if turn > 1:  # the first steps compile, the second ones settle memory
                    taken[way].append(seconds)
        for connection, process in zip(turns.values(), processes, strict=True):
            connection.send(False)
            process.join()
        plain = taken["plain loop, fp32"]
        for way, seconds_R in taken.items():
            rows.append(
                {
                    "stage": stage,
                    "loop": way,
                    "images/s": round(batch / statistics.median(seconds_R), 1),
                    "times faster": round(statistics.median(a / b for a, b in zip(plain, seconds_R, strict=True)), 2),
                }
            )
    return rows


def measure_processes(batch: int, rounds: int) -> list[dict[str, object]]:
    """Return images per second of `var train transformer` in one process of two threads and in two of one thread."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data" / "n02099601"
        data.mkdir(parents=True)
        noise = np.random.default_rng(0)
        for number in range(64):
            Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(data / f"{number}.png")
        words = ["-m", "varcli", "train", "transformer", str(data.parent), "--tokenizer", "tiny64", "--depth", "6"]
        words += ["--width", "256", "--crops", "1", "--tokens", str(Path(folder) / "tokens"), "--workers", "0", "-q"]
        words += ["--batch-size", str(batch), "--epochs", str(100 * batch / 64)]  # 100 steps
        for turn in range(rounds):
            for processes, found in rates.items():
                out = Path(folder) / f"{turn}-{processes}"
                command = [sys.executable, *words, "--out", str(out), "--nproc", str(processes)]
                environment = os.environ | {"OMP_NUM_THREADS": str(2 // processes)}
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                found.append(json.loads(lines[-1])["images_per_second"])
    medians = {processes: statistics.median(found) for processes, found in rates.items()}
    return [
        {
            "processes": processes,
            "threads each": 2 // processes,
            "images/s": round(median, 1),
            "ratio": round(median / medians[1], 2),
        }
        for processes, median in medians.items()
    ]


def main() -> None:
    """Measure and print a Markdown table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--stage", action="append", choices=STAGES, help="one of the stages; all unless given")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way takes a step, or a run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", action="store_true", help="two processes against one")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    given = parser.parse_args()
    if given.processes:
        rows = measure_processes(given.batch_size, given.rounds)
    else:
        rows = measure(given.stage or list(STAGES), given.batch_size, given.rounds, given.threads)
    print_rows(rows, as_json=given.json)


if __name__ == "__main__":
    main()
