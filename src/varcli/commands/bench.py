"""`var bench`: the cost of an image on this machine."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from varcli import __version__
from varcli.benchmarking.results import PHASES, SamplerTimings, panels
from varcli.charts import digits, png
from varcli.checkpoints.registry import presets, resolve_checkpoint
from varcli.commands import options
from varcli.console import note, notes, progress, result, table
from varcli.errors import UsageError

if TYPE_CHECKING:
    from varcli.benchmarking.results import Benchmark
    from varcli.benchmarking.samplers import Models

Random = Annotated[
    bool,
    Option(
        "--random",
        help="Random weights in the checkpoint's shape, which cost what trained ones cost: nothing is downloaded.",
    ),
]
Versus = Annotated[
    str | None,
    Option(
        "--vs",
        metavar="naive|raster",
        help="Also benchmark, interleaved, the naive reference sampler, or the same transformer sampling token by "
        "token in raster order; both separated by a comma.",
    ),
]
Batch = Annotated[int, Option("--batch-size", min=1, help="Batch size for 16-bit GPU sampling; always 1 elsewhere.")]
Rounds = Annotated[int, Option("--rounds", min=1, help="Measurements of each sampler, after a warm-up.")]
Chart = Annotated[
    Path | None, Option("--out", "-o", metavar="FILE", help="Also write a chart of where the time goes, .png.")
]


@options.expand
def bench(
    *,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    random: Random = False,
    vs: Versus = None,
    batch_size: Batch = 1,
    rounds: Rounds = 5,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    settings: options.Settings,
    out: Chart = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Benchmark sampling on this machine: time, memory and operations of each stage, beside other samplers.

    Settings are those of the metrics preset, of classes in turn. Times end with the pixels; encoding PNGs comes on top.
    """
    from varcli.acceleration.devices import pick_device
    from varcli.benchmarking.results import BenchPlan, run_benchmark
    from varcli.pipelines.model import pick_precision

    _check_chart(out)
    if "refiner" in settings or "refine_from" in settings:
        raise UsageError("--refiner cannot be used with var bench, which measures one model")
    config = replace(presets(checkpoint)["metrics"], refiner="", refine_from=0, **settings)
    where = pick_device(device)
    plan = BenchPlan(
        load=lambda: _models(checkpoint, random, quiet),
        config=config,
        device=where,
        precision=pick_precision(dtype, quantize, where),
        batch=batch_size,
        others=_others(vs),
        rounds=rounds,
    )
    with progress("batches", plan.batches, quiet) as advance:
        found = run_benchmark(plan, advance, notes(quiet))
    if out:  # first, as the reader of stdout may close the pipe
        _draw(out, f"{checkpoint}, {plan.precision}, on {found.hardware}", found)
    if as_json:
        facts = {"checkpoint": checkpoint, "random": random, "settings": asdict(config), "rounds": rounds}
        result(
            json.dumps({"kind": "varcli-bench", "version": __version__, "device": str(where)} | facts | asdict(found))
        )
    else:
        _report(found)


def _others(vs: str | None) -> list[str]:
    """What to compare with, each once."""
    given = [name.strip() for name in vs.split(",")] if vs is not None else []
    if "plain" in given:
        note("--vs plain is now --vs naive; the old name will be removed in the next version")
        given = ["naive" if name == "plain" else name for name in given]
    if set(given) - {"naive", "raster"}:
        raise UsageError(f"--vs must be naive, raster, or naive,raster (got {vs})")
    return list(dict.fromkeys(given))


def _models(checkpoint: str, random: bool, quiet: bool) -> "Models":
    """Return the checkpoint's models, on the CPU."""
    from varcli.checkpoints.random_init import random_models
    from varcli.checkpoints.store import load_model

    if random:
        return random_models(checkpoint)
    model = load_model(resolve_checkpoint(checkpoint, progress=not quiet))
    return model.tokenizer, model.transformer


def _check_chart(out: Path | None) -> None:
    """Check that the chart can be written, before anything is measured."""
    if out:
        from varcli.outputs.open import check_file

        check_file("out", out, (".png",))


# --- what is printed ----------------------------------------------------------------------------------


def _report(found: "Benchmark") -> None:
    """Print a table of the whole cost of an image, and one of its stages; one column per sampler."""
    names = [each.sampler for each in found.samplers]
    table(("", *names), [_filled(row, 1 + len(names)) for row in _totals(found)])
    table(("milliseconds per image", *names, "GFLOP", "of matmul"), _stages(found.samplers))


def _totals(found: "Benchmark") -> list[list[str]]:
    each = found.samplers
    memory = "" if found.peak_bytes is None else digits(found.peak_bytes / 1e9)
    return [
        ["machine", found.hardware],
        ["precision", *(one.precision for one in each)],
        ["batch size", *(str(one.batch_size) for one in each)],
        ["CUDA graphs", *("yes" if one.cuda_graphs else "no" for one in each)],
        ["seconds per image", *(digits(one.seconds_per_image) for one in each)],
        ["times varcli's", *(digits(one.times_varcli) for one in each)],
        ["images per second, one batch alone", *(digits(one.images_per_second) for one in each)],
        *([f"latency {name}, s", *(digits(one.latency[name]) for one in each)] for name in each[0].latency),
        ["GFLOP per image", *(digits(one.operations / 1e9) for one in each)],
        ["matmul here, GFLOP/s", *(digits(one.matmul_rate / 1e9) for one in each)],
        ["of matmul", *(f"{one.matmul_fraction:.1%}" for one in each)],
        ["peak memory, GB", memory],
    ]


def _stages(samplers: Sequence[SamplerTimings]) -> list[list[str]]:
    """Return one row per stage: milliseconds of each sampler; operations, and their rate in the first that has it."""
    columns = [{stage.name: stage for stage in each.stages} for each in samplers]
    phases = {name: PHASES.index(stage.phase) for column in columns for name, stage in column.items()}
    rows = []
    for name in sorted(phases, key=phases.__getitem__):
        stages = [column.get(name) for column in columns]
        first = next(stage for stage in stages if stage)
        times = ["" if stage is None else digits(1000 * stage.seconds) for stage in stages]
        gflop = "" if first.operations is None else digits(first.operations / 1e9)
        fraction = "" if first.matmul_fraction is None else f"{first.matmul_fraction:.0%}"
        rows.append([name, *times, gflop, fraction])
    return rows


def _filled(row: list[str], columns: int) -> list[str]:
    return [*row, *[""] * (columns - len(row))]


def _draw(out: Path, title: str, found: "Benchmark") -> None:
    """Write the chart."""
    from varcli.files import write_atomically

    write_atomically(out, png(*panels(title, found.samplers)))
