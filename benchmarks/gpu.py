"""All that is to be known about a GPU, in one run of less than ten minutes: speed, memory, what each part brings.

    python benchmarks/gpu.py [--dtype bf16] [--seconds 4] [--json gpu.json]
    python benchmarks/gpu.py --device cpu --quick          # models of no size, to see that it works

It measures models of released shapes with random weights, which cost what trained ones cost, on pictures of the
paper's settings, pixels in the host's memory. The ways to make them take turns in every round; medians.

recorded     what `var sample` does: fused blocks, CUDA graphs, pixels fetched while the next batch is made
eager        the same without graphs
plain blocks the same without fused blocks either: the readable loop, in batches
plain twin   the specification: one picture at a time in float32, without a cache

`latency` is from the request to the last pixel with nothing else under way, `pictures/s` is with batches one after
the other, `MFU` their operations (see `varcli/benchmarking/operations.py`) over those of plain matrix products,
`times plain` is over the plain twin at batch 1 and over plain blocks beyond.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from tables import print_rows

from varcli.benchmarking.machine import hardware, matmul_rate
from varcli.benchmarking.operations import decoder_operations, transformer_operations
from varcli.checkpoints.store import without_initialization
from varcli.config import PRESETS, TokenizerConfig, TransformerConfig
from varcli.data.images import Provenance
from varcli.data.outputs import open_output
from varcli.data.writing import Writer
from varcli.errors import RunError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling import plain, sampler, scale_model
from varcli.sampling.batches import BatchSampler
from varcli.sampling.devices import pick_device, pick_dtype, place, synchronize
from varcli.scales import GRID_256

CONFIG = PRESETS["metrics"]
Models = tuple[Tokenizer, Transformer]


@dataclass(frozen=True)
class Wanted:
    """A picture to be made."""

    row: int
    seed: int
    made: Provenance = Provenance(  # noqa: RUF009 - frozen
        checkpoint="random", checkpoint_sha256="0" * 64, class_id=None, class_name="none", seed=0, cfg=1.5, top_k=900,
        top_p=0.96, smooth=False, device="cuda", dtype="bf16", version="0",
    )  # fmt: skip


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

    def models(self, depth: int) -> Models:
        """Return models of a released shape, or of none for a quick run, with random weights, in place."""
        tokenizer, transformer = random_models(depth, self.quick)
        place(tokenizer, transformer, self.device, self.precision)
        return tokenizer, transformer


def random_models(depth: int, quick: bool) -> Models:
    """Return models of a released shape with random weights."""
    shape = {"sides": (1, 2, 4) if quick else GRID_256, "codebook_size": 64 if quick else 4096}
    sizes = {"base_width": 32, "multipliers": (1, 1)} if quick else {}
    width = 64 if quick else 64 * depth
    with without_initialization():
        tokenizer = Tokenizer(TokenizerConfig(**shape, **sizes))
        transformer = Transformer(
            TransformerConfig(depth=2 if quick else depth, width=width, codebook_width=32, **shape)
        )
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*tokenizer.parameters(), *transformer.parameters()]:
            parameter.normal_(0, 0.02, generator=source)
    return tokenizer.eval(), transformer.eval()


@contextmanager
def plain_blocks() -> Iterator[None]:
    """Sample without `models.fused`."""
    with mock.patch.object(scale_model, "fusible", lambda transformer: False):
        yield


def requests(models: Models, count: int, first: int) -> list[Wanted]:
    """Return so many pictures, the classes taking turns."""
    return [Wanted(seed % models[1].config.class_count, seed) for seed in range(first, first + count)]


def ways(models: Models, twin: Models | None, batch: int) -> dict[str, Callable[[int, int], None]]:
    """Return what makes so many pictures, from a seed on, in each way."""
    recorded, eager, plain_ones = (BatchSampler(*models, CONFIG, batch) for _ in range(3))
    eager.recorder = plain_ones.recorder = None

    def through(used: BatchSampler) -> Callable[[int, int], None]:
        def make(count: int, first: int) -> None:
            for _ in used.pictures(requests(models, count, first)):
                pass
            if used.batch_size < batch and models[1].pos_start.is_cuda:
                raise TooLargeError

        return make

    def make_plainly(count: int, first: int) -> None:
        with plain_blocks():
            through(plain_ones)(count, first)

    def make_by_twin(count: int, first: int) -> None:
        for wanted in requests(models, count, first):
            plain.sample(*twin, wanted.row, wanted.seed, CONFIG)[1].cpu()

    found = {"recorded": through(recorded), "eager": through(eager), "plain blocks": make_plainly}
    return found | ({"plain twin": make_by_twin} if twin else {})


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Return seconds, with nothing left to do at the beginning and at the end."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def measure(  # noqa: PLR0917
    run: Run, name: str, models: Models, twin: Models | None, batch: int, rate: float
) -> list[dict[str, object]]:
    """Return a row a way to make pictures of a model in batches of one size; none if they do not fit."""
    try:
        return measured(run, name, models, twin, batch, rate)
    except (TooLargeError, RunError):
        sys.stderr.write(f"{name}: {batch} pictures at a time do not fit into memory\n")
        return []


def measured(  # noqa: PLR0917
    run: Run, name: str, models: Models, twin: Models | None, batch: int, rate: float
) -> list[dict[str, object]]:
    """Return the same, failing if they do not fit."""
    makers, streams = ways(models, twin, batch), 3
    latency: dict[str, list[float]] = {way: [] for way in makers}
    throughput: dict[str, list[float]] = {way: [] for way in makers}
    peak: dict[str, float] = {}
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    for make in makers.values():
        make(batch, 0), make(batch, 0), make(batch, 0)  # the second one records
        if run.device.type == "cuda":
            peak.setdefault("recorded", torch.cuda.max_memory_allocated(run.device) / 1e9)  # later ones come on top
    until = time.perf_counter() + run.seconds * len(makers)
    while time.perf_counter() < until or len(latency["recorded"]) < 3:
        for way, make in makers.items():
            latency[way].append(timed(run.device, lambda make=make: make(batch, 0)))
            throughput[way].append(timed(run.device, lambda make=make: make(streams * batch, 0)) / (streams * batch))
    counts = [side * side for side in models[1].config.sides]
    operations = sum(transformer_operations(models[1].config, counts, guided=True)) + decoder_operations(
        models[0].config
    )
    slowest = statistics.median(throughput["plain twin" if twin else "plain blocks"])
    rows = []
    for way in makers:
        seconds = statistics.median(throughput[way])
        rows.append(
            {
                "model": name,
                "batch": batch,
                "way": way,
                "latency ms": round(1e3 * statistics.median(latency[way]), 2),
                "pictures/s": round(1 / seconds, 2),
                "times plain": round(slowest / seconds, 2),
                "MFU": round(operations / seconds / rate, 3),
                "peak GB": round(peak[way], 2) if way in peak else None,
            }
        )
    return rows


def whole_pipeline(run: Run, models: Models, batch: int) -> dict[str, object]:
    """Return pictures a second when they are left in memory, and when they become PNG files as `var sample` does it."""
    made = BatchSampler(*models, CONFIG, batch)
    count = 4 * batch

    def bare() -> None:
        for _ in made.pictures(requests(models, count, 0)):
            pass

    def to_files() -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            open_output(folder + "/", several=True) as output,
            Writer(output, lambda item, path: None, 2 * batch) as writer,
        ):
            for wanted, pixels in made.pictures(requests(models, count, 0)):
                item = replace(wanted, made=replace(wanted.made, seed=wanted.seed))
                writer.put(item, writer.prepare(item, pixels))

    bare(), to_files()
    taken: dict[str, list[float]] = {"to memory": [], "to PNG files": []}
    for _ in range(3):
        taken["to memory"].append(timed(run.device, bare))
        taken["to PNG files"].append(timed(run.device, to_files))
    memory, files = (statistics.median(times) for times in taken.values())
    speeds = {"to memory, pictures/s": round(count / memory, 2), "to PNG files, pictures/s": round(count / files, 2)}
    return {"batch": batch, **speeds, "kept up": round(memory / files, 3)}


def differing(models: Models, together: int) -> dict[str, object]:
    """Return the share of tokens that come out differently when pictures are made together, not one by one."""

    def tokens(wanted: Sequence[Wanted]) -> torch.Tensor:
        rows, seeds = [w.row for w in wanted], [w.seed for w in wanted]
        return torch.cat([r.tokens.cpu() for r in sampler.generate(*models, rows, seeds, CONFIG)], dim=1)

    wanted = requests(models, together, 0)
    changed = tokens(wanted) != torch.cat([tokens([one]) for one in wanted])
    share = changed.float().mean().item()
    return {"together": together, "tokens that differ": round(share, 4), "first scale": changed[:, 0].any().item()}


def decoder_choices(run: Run, models: Models, batch: int) -> dict[str, object]:
    """Return milliseconds a picture in the decoder, with cuDNN's own choice of kernels and with tried ones."""
    config = models[0].config
    f_hat_BCHW = torch.randn(batch, config.codebook_width, config.sides[-1], config.sides[-1], device=run.device)
    found: dict[str, object] = {"batch": batch}
    for tried in (False, True):
        with torch.backends.cudnn.flags(enabled=True, benchmark=tried):
            times = [timed(run.device, lambda: sampler.decode_on_device(models[0], f_hat_BCHW)) for _ in range(6)]
        found["tried kernels, ms" if tried else "own choice, ms"] = round(1e3 * statistics.median(times[2:]) / batch, 3)
    return found


def all_figures(run: Run) -> dict[str, object]:
    """Return everything."""
    rate = matmul_rate(run.device, run.precision)
    sizes = (1, 2) if run.quick else (1, 8, 64, 128, 256)
    speed: list[dict] = []
    models = run.models(16)
    twin = copy.deepcopy(random_models(16, run.quick))
    for part in twin:
        part.to(run.device)
    for batch in sizes:
        speed += measure(run, "d16", models, twin if batch == 1 else None, batch, rate)
    largest = sizes[-1] if run.quick else 64
    rest = {
        "pipeline": whole_pipeline(run, models, largest),
        "batches": differing(models, largest),
        "decoder": decoder_choices(run, models, min(largest, 16)),
    }
    del models, twin
    speed += measure(run, "d30", run.models(30), None, largest, rate)
    machine = {"device": hardware(run.device), "python": platform.python_version(), "torch": torch.__version__}
    asked = {"dtype": run.precision, "quick": run.quick, "config": asdict(CONFIG)}
    return machine | asked | {"matmul TFLOP/s": round(rate / 1e12, 2), "speed": speed} | rest


def main() -> None:
    """Measure and print tables; write everything as JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="where to measure")
    parser.add_argument("--dtype", default="auto", help="bf16 or fp16")
    parser.add_argument("--seconds", type=float, default=4, help="for each way at each size of batch")
    parser.add_argument("--quick", action="store_true", help="models of no size, once")
    parser.add_argument("--json", type=Path, help="a file for everything")
    given = parser.parse_args()
    device = pick_device(given.device)
    precision = pick_dtype(given.dtype, device)
    begin = time.perf_counter()
    found = all_figures(Run(device, precision, given.quick, 0 if given.quick else given.seconds))
    found["seconds"] = round(time.perf_counter() - begin, 1)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{found['device']}, {precision}, {found['matmul TFLOP/s']} TFLOP/s in plain products\n\n")
    for part in ("speed", "pipeline", "batches", "decoder"):
        rows = found[part]
        print_rows(rows if isinstance(rows, list) else [rows], as_json=False)
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
