"""What `gpu.py` measures, part by part: an error in one of them, or in one way to make images, ends no other."""

import gc
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from gpu_book import Row
from gpu_ways import CONFIG, Make, Run, other_ways, requests, sampling

from varcli.acceleration.cuda_blocks import GpuBlock
from varcli.acceleration.devices import DTYPES, free_memory, synchronize
from varcli.acceleration.dispatch import gpu_block, norm_kernel
from varcli.benchmarking.flops import decoder_operations, transformer_operations
from varcli.benchmarking.samplers import Models, Wanted
from varcli.benchmarking.timing import hardware, matmul_rate
from varcli.config import SampleConfig
from varcli.errors import RunError
from varcli.images.provenance import Provenance
from varcli.outputs.async_writer import AsyncWriter
from varcli.outputs.open import open_sink
from varcli.sampling import sampler
from varcli.sampling.batching import BatchSampler


def tried(run: Run, part: str, work: Callable[[], object]) -> bool:
    """Return whether work was done; whatever it raises is noted down, so that the run can go on."""
    try:
        work()
    except Exception as error:
        run.book.failed(part, error)
    else:
        return True
    with suppress(Exception):  # what the GPU was doing ends here, and not in the next part
        synchronize(run.device)
    return False


def machine(run: Run) -> Row:
    """Return what computes, and with which libraries."""
    found: Row = {"device": hardware(run.device), "python": platform.python_version(), "torch": torch.__version__}
    if run.device.type != "cuda":
        return found
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        found["driver"] = told[0] if told else None
    memory = torch.cuda.get_device_properties(run.device).total_memory
    libraries = {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    dtype = DTYPES[run.precision]
    kernels = {
        "kernels of blocks": gpu_block(run.device, dtype) is not GpuBlock,
        "kernels of norms": norm_kernel(run.device, dtype) is not None,
    }
    return found | libraries | kernels | {"memory GB": round(memory / 1e9, 1)}


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Return seconds, with nothing left to do at the beginning and at the end."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def measure(run: Run, part: str, name: str, models: Models, *, batch: int, makers: dict[str, Make]) -> list[Row]:
    """Return a row for each way to make images in batches of one size that does not fail, "recorded" first.

    Raises:
        RunError: all of them failed.
    """
    taken = measured(run, part, batch, makers)
    if not taken.latency:
        raise RunError("no way to make images is left")
    return rows(name, models, batch, taken)


STREAM = 3
"""Batches one after the other."""


@dataclass(frozen=True)
class Taken:
    """What the rounds gave, without the ways that failed."""

    latency: dict[str, list[float]]
    """Seconds, of each way."""
    throughput: dict[str, list[float]]
    """Seconds an image, of each way."""
    rates: list[float]
    """Of matrix products, one a round."""
    peak: float | None
    """Gigabytes of "recorded", before any other was run."""


def measured(run: Run, part: str, batch: int, makers: dict[str, Make]) -> Taken:
    """Return what the ways took, taking turns; one that fails is noted down and has no more turns."""
    peak = warm_up(run, part, batch, makers)
    taken = Taken({way: [] for way in makers}, {way: [] for way in makers}, [], peak)
    until = time.perf_counter() + run.seconds * len(makers)
    while makers and (time.perf_counter() < until or len(taken.rates) < 3):
        for way in list(makers):
            if not tried(run, f"{part}: {way}", partial(turn, run, taken, way, makers[way], batch)):
                del taken.latency[way], taken.throughput[way]
                forget(run, makers, way)
        taken.rates.append(matmul_rate(run.device, run.precision))
    return taken


def turn(run: Run, taken: Taken, way: str, make: Make, batch: int) -> None:
    """Measure one way once."""
    taken.latency[way].append(timed(run.device, lambda: make(batch, 0)))
    taken.throughput[way].append(timed(run.device, lambda: make(STREAM * batch, 0)) / (STREAM * batch))


def warm_up(run: Run, part: str, batch: int, makers: dict[str, Make]) -> float | None:
    """Make the batches that nobody counts, remove the ways that fail, return what memory "recorded" takes."""
    on_gpu, peak = run.device.type == "cuda", None
    gc.collect()  # samplers of before and their recordings refer to each other
    if on_gpu:
        clear_workspaces(run.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    for way in list(makers):
        if not tried(run, f"{part}: {way}", partial(three_batches, run, makers[way], batch)):
            forget(run, makers, way)
        elif on_gpu and way == "recorded":
            peak = torch.cuda.max_memory_allocated(run.device) / 1e9
    return peak


def forget(run: Run, makers: dict[str, Make], way: str) -> None:
    """Remove a way that failed, and free the memory it had."""
    del makers[way]
    gc.collect()
    free_memory(run.device)


def three_batches(run: Run, make: Make, batch: int) -> None:
    """Make one batch as it is, one while it is recorded, one that is played."""
    for _ in range(3):
        make(batch, 0)
    synchronize(run.device)  # an error of the GPU is this way's


def clear_workspaces(device: torch.device) -> None:
    """Free cuBLAS's workspaces, of which torch up to 2.11 keeps one for each stream ever recorded on.

    To be called only while no recorded graph is alive, as a graph goes on writing into the workspace it was recorded
    with. So it is before the first batch of a part: the samplers of earlier parts, whose runners alone hold graphs, are
    gone, those of failed ones too, as of an error only the text is kept; and those of this part have made nothing yet.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        synchronize(device)  # nothing under way uses them
        clear()


def rows(name: str, models: Models, batch: int, taken: Taken) -> list[Row]:
    """Return what there is to say of each way."""
    config = models[1].config
    tokens = {"raster": [1] * config.sides[-1] ** 2}
    latencies = {way: statistics.median(seconds) for way, seconds in taken.latency.items()}
    medians = {way: statistics.median(seconds) for way, seconds in taken.throughput.items()}
    rate, found = statistics.median(taken.rates), list[Row]()
    for way, seconds in medians.items():
        counts = tokens.get(way, [side * side for side in config.sides])
        operations = sum(transformer_operations(config, counts, rows=2)) + decoder_operations(models[0].config)
        found.append(
            {
                "model": name,
                "batch": batch,
                "way": way,
                "latency ms": round(1e3 * latencies[way], 2),
                "images/s": round(1 / seconds, 2),
                "times twin": times(latencies.get("plain twin"), latencies[way]),
                "times plain": times(medians.get("plain blocks"), seconds),
                "times recorded": times(medians.get("recorded"), seconds),
                "MFU": round(operations / seconds / rate, 3),
                "matmul TFLOP/s": round(rate / 1e12, 2),
                "peak GB": round(taken.peak, 2) if taken.peak and way == "recorded" else None,
            }
        )
    return found


def times(other: float | None, seconds: float) -> float | None:
    """Return how many times faster than another way this one is, None where the other failed or was not asked for."""
    return None if other is None else round(other / seconds, 2)


def beside_recorded(run: Run, part: str, models: Models, batch: int, way: str) -> list[Row]:
    """Return the row of int8, of an approximation or of the raster baseline, measured beside `recorded`."""
    both = {"recorded": sampling(run, models, batch), way: other_ways(run, models, batch)[way]()}
    return [row for row in measure(run, part, "d16", models, batch=batch, makers=both) if row["way"] == way]


@contextmanager
def frozen() -> Iterator[None]:
    """Keep the garbage collector, which torch calls before each recording, from all that there is so far."""
    gc.collect()  # or garbage is kept as well, with graphs in it
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


PROVENANCE = Provenance(
    checkpoint="random", checkpoint_sha256="0" * 64, class_id=None, class_name="none", seed=0,
    settings=SampleConfig(), device="cuda", dtype="bf16", version="0",
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """An image on its way into a file."""

    provenance: Provenance


def whole_pipeline(run: Run, models: Models, batch: int) -> Row:
    """Return images a second when they are left in memory, and when they become PNG files as `var sample` does it."""
    made = BatchSampler(*models, CONFIG, batch)
    count = 4 * batch

    def bare() -> None:
        for _ in made.images(requests(models, count, 0)):
            pass

    def to_files() -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            open_sink(folder + "/", several=True) as output,
            AsyncWriter[File](output, lambda item, path: None, 2 * batch) as writer,
        ):
            for wanted, pixels in made.images(requests(models, count, 0)):
                item = File(replace(PROVENANCE, seed=wanted.seed))
                writer.put(item, writer.prepare(item, pixels))

    bare()
    to_files()
    taken: dict[str, list[float]] = {"to memory": [], "to PNG files": []}
    for _ in range(3):
        taken["to memory"].append(timed(run.device, bare))
        taken["to PNG files"].append(timed(run.device, to_files))
    memory, files = (statistics.median(times) for times in taken.values())
    speeds = {"to memory, images/s": round(count / memory, 2), "to PNG files, images/s": round(count / files, 2)}
    return {"batch": batch, **speeds, "kept up": round(memory / files, 3)}


def differing(models: Models, together: int) -> Row:
    """Return the share of tokens that come out differently when images are made together, not one by one."""

    def tokens(wanted: Sequence[Wanted]) -> torch.Tensor:
        rows, seeds = [w.label for w in wanted], [w.seed for w in wanted]
        return torch.cat([r.tokens.cpu() for r in sampler.generate(*models, rows, seeds, CONFIG)], dim=1)

    wanted = requests(models, together, 0)
    changed = tokens(wanted) != torch.cat([tokens([one]) for one in wanted])
    share = changed.float().mean().item()
    return {"together": together, "tokens that differ": round(share, 4), "first scale": changed[:, 0].any().item()}


def decoder_choices(run: Run, models: Models, batch: int) -> Row:
    """Return milliseconds an image in the decoder, with cuDNN's own choice of kernels and with tried ones."""
    config = models[0].config
    f_hat_BCHW = torch.randn(batch, config.codebook_width, config.sides[-1], config.sides[-1], device=run.device)
    found: Row = {"batch": batch}
    for tried in (False, True):
        with torch.backends.cudnn.flags(enabled=True, benchmark=tried):
            times = [timed(run.device, lambda: sampler.decode_on_device(models[0], f_hat_BCHW)) for _ in range(6)]
        found["tried kernels, ms" if tried else "own choice, ms"] = round(1e3 * statistics.median(times[2:]) / batch, 3)
    return found
