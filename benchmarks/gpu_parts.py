"""What `gpu.py` measures, part by part: an error in a part, or in a way to sample, does not stop the others."""

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
from gpu_log import Row
from gpu_ways import CONFIG, Make, Run, other_ways, requests, sampling

from varcli.acceleration.cuda_blocks import GpuBlock
from varcli.acceleration.devices import DTYPES, free_memory, synchronize
from varcli.acceleration.dispatch import gpu_block, norm_kernel
from varcli.benchmarking.flops import decoder_operations, transformer_operations
from varcli.benchmarking.samplers import BenchRequest, Models
from varcli.benchmarking.timing import hardware, matmul_rate
from varcli.config import SampleConfig
from varcli.errors import RunError
from varcli.images.provenance import Provenance
from varcli.outputs.async_writer import AsyncWriter
from varcli.outputs.open import open_sink
from varcli.sampling import sampler
from varcli.sampling.batching import BatchSampler


def tried(run: Run, part: str, work: Callable[[], object]) -> bool:
    """Return whether work succeeded; any error is recorded, and the run goes on."""
    try:
        work()
    except Exception as error:
        run.log.failed(part, error)
    else:
        return True
    with suppress(Exception):  # so that pending work does not fail in the next part
        synchronize(run.device)
    return False


def machine(run: Run) -> Row:
    """Return the hardware and the versions of the libraries."""
    found: Row = {"device": hardware(run.device), "python": platform.python_version(), "torch": torch.__version__}
    if run.device.type != "cuda":
        return found
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        printed = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        found["driver"] = printed[0] if printed else None
    memory = torch.cuda.get_device_properties(run.device).total_memory
    libraries = {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    dtype = DTYPES[run.precision]
    kernels = {
        "block kernels": gpu_block(run.device, dtype) is not GpuBlock,
        "norm kernels": norm_kernel(run.device, dtype) is not None,
    }
    return found | libraries | kernels | {"memory GB": round(memory / 1e9, 1)}


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Return the seconds of work, with the device idle before and after."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def measure(run: Run, part: str, name: str, models: Models, *, batch: int, makers: dict[str, Make]) -> list[Row]:
    """Return a row for each way to sample batches of one size that does not fail, "captured" first.

    Raises:
        RunError: all of them failed.
    """
    taken = measured(run, part, batch, makers)
    if not taken.latency:
        raise RunError("all ways to sample images failed")
    return rows(name, models, batch, taken)


STREAM = 3
"""Batches in a row, for the throughput."""


@dataclass(frozen=True)
class Taken:
    """Measurements of all rounds, without the ways that failed."""

    latency: dict[str, list[float]]
    """Seconds per batch, of each way."""
    throughput: dict[str, list[float]]
    """Seconds per image, of each way."""
    rates: list[float]
    """Of matrix products, one per round."""
    peak: float | None
    """Gigabytes of "captured", before any other way ran."""


def measured(run: Run, part: str, batch: int, makers: dict[str, Make]) -> Taken:
    """Time the ways, interleaved round by round; one that fails is recorded and left out from then on."""
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
    """Sample batches that are not timed, remove the ways that fail, and return the peak memory of "captured"."""
    on_gpu, peak = run.device.type == "cuda", None
    gc.collect()  # earlier samplers and their graphs refer to each other
    if on_gpu:
        clear_workspaces(run.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    for way in list(makers):
        if not tried(run, f"{part}: {way}", partial(three_batches, run, makers[way], batch)):
            forget(run, makers, way)
        elif on_gpu and way == "captured":
            peak = torch.cuda.max_memory_allocated(run.device) / 1e9
    return peak


def forget(run: Run, makers: dict[str, Make], way: str) -> None:
    """Remove a way that failed, and free its memory."""
    del makers[way]
    gc.collect()
    free_memory(run.device)


def three_batches(run: Run, make: Make, batch: int) -> None:
    """Sample three batches: the first runs eagerly, the second is captured, the third replayed."""
    for _ in range(3):
        make(batch, 0)
    synchronize(run.device)  # so that an error of the GPU is raised here


def clear_workspaces(device: torch.device) -> None:
    """Free cuBLAS's workspaces, of which torch up to 2.11 keeps one for each stream ever used for a capture.

    Call it only while no graph is alive, as a replay writes into the workspace that the graph was captured with. Before
    the first batch of a part that holds: only samplers' runners hold graphs, the samplers of earlier parts are freed
    (also of those that failed, as only the text of an error is kept), and those of this part have not run yet.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        synchronize(device)  # pending work may still use them
        clear()


def rows(name: str, models: Models, batch: int, taken: Taken) -> list[Row]:
    """Return the figures of each way."""
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
                "times naive": times(latencies.get("naive"), latencies[way]),
                "times plain": times(medians.get("plain blocks"), seconds),
                "times captured": times(medians.get("captured"), seconds),
                "MFU": round(operations / seconds / rate, 3),
                "matmul TFLOP/s": round(rate / 1e12, 2),
                "peak GB": round(taken.peak, 2) if taken.peak and way == "captured" else None,
            }
        )
    return found


def times(other: float | None, seconds: float) -> float | None:
    """Return the speedup over another way, None if the other failed or was not measured."""
    return None if other is None else round(other / seconds, 2)


def beside_captured(run: Run, part: str, models: Models, batch: int, way: str) -> list[Row]:
    """Return the row of int8, of an approximation or of the raster baseline, interleaved with captured."""
    both = {"captured": sampling(run, models, batch), way: other_ways(run, models, batch)[way]()}
    return [row for row in measure(run, part, "d16", models, batch=batch, makers=both) if row["way"] == way]


@contextmanager
def frozen() -> Iterator[None]:
    """Exempt all present objects from garbage collection, which torch runs before each capture."""
    gc.collect()  # or garbage is exempt too, with graphs in it
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
    """An image to be written."""

    provenance: Provenance


def whole_pipeline(run: Run, models: Models, batch: int) -> Row:
    """Return images per second into memory, and into PNG files as `var sample` writes them."""
    made = BatchSampler(*models, CONFIG, batch)
    count = 4 * batch

    def to_memory() -> None:
        for _ in made.images(requests(models, count, 0)):
            pass

    def to_files() -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            open_sink(folder + "/", several=True) as sink,
            AsyncWriter[File](sink, lambda item, path: None, 2 * batch) as writer,
        ):
            for wanted, pixels in made.images(requests(models, count, 0)):
                item = File(replace(PROVENANCE, seed=wanted.seed))
                writer.put(item, writer.prepare(item, pixels))

    to_memory()
    to_files()
    taken: dict[str, list[float]] = {"to memory": [], "to PNG files": []}
    for _ in range(3):
        taken["to memory"].append(timed(run.device, to_memory))
        taken["to PNG files"].append(timed(run.device, to_files))
    memory, files = (statistics.median(times) for times in taken.values())
    speeds = {"to memory, images/s": round(count / memory, 2), "to PNG files, images/s": round(count / files, 2)}
    return {"batch": batch, **speeds, "ratio": round(memory / files, 3)}


def differing(models: Models, batch: int) -> Row:
    """Return the fraction of tokens that differ when images are sampled in one batch rather than one by one."""

    def tokens(wanted: Sequence[BenchRequest]) -> torch.Tensor:
        rows, seeds = [w.label for w in wanted], [w.seed for w in wanted]
        return torch.cat([r.tokens.cpu() for r in sampler.generate(*models, rows, seeds, CONFIG)], dim=1)

    wanted = requests(models, batch, 0)
    changed = tokens(wanted) != torch.cat([tokens([one]) for one in wanted])
    share = changed.float().mean().item()
    return {"batch": batch, "tokens that differ": round(share, 4), "first scale": changed[:, 0].any().item()}


def decoder_choices(run: Run, models: Models, batch: int) -> Row:
    """Return the decoder's milliseconds per image with cuDNN's heuristic choice of kernels and its benchmark mode."""
    config = models[0].config
    f_hat_BCHW = torch.randn(batch, config.codebook_width, config.sides[-1], config.sides[-1], device=run.device)
    found: Row = {"batch": batch}
    for benchmark in (False, True):
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark):
            times = [timed(run.device, lambda: sampler.decode_on_device(models[0], f_hat_BCHW)) for _ in range(6)]
        name = "benchmark mode, ms" if benchmark else "heuristic, ms"
        found[name] = round(1e3 * statistics.median(times[2:]) / batch, 3)
    return found
