"""`var sample`: classes in, images out."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Exit

from varcli.checkpoints.registry import resolve_checkpoint
from varcli.commands import eval_options, options
from varcli.commands.production import Production, Results, check_sheet
from varcli.commands.series import SampleRequest, Series, candidates, from_stdin
from varcli.commands.settings import origin_of, settings
from varcli.console import notes, progress
from varcli.distributed import launch, launched, process_group
from varcli.errors import UsageError

if TYPE_CHECKING:
    from varcli.commands.production import Sampled
    from varcli.images.provenance import Pixels
    from varcli.sampling.batching import BatchSampler


def sample(  # noqa: PLR0917 - options are given by name
    classes: options.Classes,
    count: options.Count = 1,
    seed: options.Seed = 0,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    cfg: options.Cfg = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    smooth: options.Smooth = False,
    preset: options.Preset = options.DEFAULT_PRESET,
    approximate: options.Approximate = None,
    out: options.Out = None,
    grid: options.Grid = None,
    scales: options.Scales = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    best: eval_options.Best = None,
    classifier: eval_options.Classifier = eval_options.DEFAULT_CLASSIFIER,
    nproc: options.Processes = 1,
    resume: options.Resume = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make images of classes. The same class, seed and settings always give the same image."""
    _check_together(out=out, grid=grid, scales=scales, resume=resume, as_json=as_json)
    options.check_precision(dtype, quantize)
    _check_fraction(best)
    _check_places(out, grid, scales)
    if nproc > 1 or launched():
        _check_shared(classes, scales)
    if nproc > 1 and not launched():
        raise Exit(launch(nproc))
    from varcli.acceleration.devices import pick_device, pick_dtype, precision_reason, prepare
    from varcli.checkpoints.store import load_model
    from varcli.outputs.open import find_sink
    from varcli.sampling.batching import BatchSampler

    approximations = options.parse_approximations(approximate)
    config = settings(checkpoint, preset, cfg=cfg, top_k=top_k, top_p=top_p, smooth=smooth, approximate=approximations)
    with process_group() as group:
        quiet = quiet or not group.is_main
        say = notes(quiet)
        where = pick_device(group.device(device))
        precision = quantize or pick_dtype(dtype, where)
        model = load_model(resolve_checkpoint(checkpoint, progress=not quiet))
        named = where.type if group.world_size > 1 else str(where)
        origin = origin_of(checkpoint, model.sha256, config, named, precision)
        images, known = Series(model.classes, candidates(count, best or 1), seed, origin, say).classes(classes)
        total = None if known is None else known * count
        _check_counts(grid, scales, total)
        output = find_sink(out, several=total != 1)
        if group.is_main:
            output.open(resume)
        with output, progress("images", total, quiet) as advance:
            if precision not in (dtype, quantize):
                say(precision_reason(precision, where))
            prepare(model.tokenizer, model.transformer, where, precision)
            sampler = BatchSampler(model.tokenizer, model.transformer, config, batch_size, say)
            results = Results(output, grid, as_json, quiet, advance)
            sampled: Sampled = partial(_sampled, sampler, scales)
            if best:
                from varcli.commands.election import Election
                from varcli.evaluation.classifier import Classifier

                election = Election(sampler, Classifier(classifier, model.classes, where), count, group)
                images = election.chosen(images)
                images = images if group.world_size == 1 else list(images)  # for which all processes are needed
                sampled = sampled if scales else election.images
            # What is known beforehand is made in batches across classes, what stdin brings is answered line by line.
            bursts = images if total is None else [chain.from_iterable(images)]
            Production(sampled, results, group, sampler.batch_size).run(bursts)
        if group.is_main:
            results.finish(say)


def _sampled(
    sampler: "BatchSampler", scales: Path | None, wanted: Iterable[SampleRequest]
) -> Iterator[tuple[SampleRequest, "Pixels"]]:
    """Yield each image when it is made, having shown how it grew where that is asked for."""
    if scales is None:
        yield from sampler.images(wanted)
        return
    from varcli.images.contact_sheet import save_growth

    for image in wanted:
        frames = list(sampler.growth(image))
        labels = [f"{side} × {side}" for side in sampler.transformer.config.sides]
        save_growth(scales, frames, labels, image.made)
        yield image, frames[-1]


# --- what goes together ----------------------------------------------------------------------------


def _check_together(*, out: str | None, grid: Path | None, scales: Path | None, resume: bool, as_json: bool) -> None:
    if out == "-" and as_json:
        raise UsageError("json: with --out -; stdout can carry the images or the lines, not both")
    if resume and (grid or scales):
        raise UsageError("resume: with --grid or --growth; they show what this run makes, so one without the other")


def _check_fraction(best: float | None) -> None:
    if best is not None and not 0 < best <= 1:
        raise UsageError(f"best: {best:g}; a fraction above 0, up to 1")


def _check_shared(classes: Sequence[str], scales: Path | None) -> None:
    """Find out whether several processes can share the work."""
    if from_stdin(classes):
        raise UsageError("class: - with several processes; classes from stdin are answered one by one, by one process")
    if scales:
        raise UsageError("scales: with several processes; it shows one image, which one process makes")


def _check_places(out: str | None, grid: Path | None, scales: Path | None) -> None:
    """Find out whether all that is to be written can be, before anything is downloaded or made."""
    from varcli.outputs.open import check_file, check_sink

    check_sink(out)
    if grid:
        check_file("grid", grid, (".png",))
    if scales:
        check_file("scales", scales, (".png", ".gif"))


def _check_counts(grid: Path | None, scales: Path | None, total: int | None) -> None:
    """Find out whether so many images can be shown on a sheet, or growing."""
    if grid and total:
        check_sheet(total)
    if scales and total != 1:
        raise UsageError(f"scales: {total or 'any number of'} images; exactly one")
