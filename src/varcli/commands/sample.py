"""`var sample`: classes in, pictures out."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Exit

from varcli.checkpoints.registry import find
from varcli.commands import eval_options, options
from varcli.commands.production import Production, Results, check_sheet
from varcli.commands.series import Picture, Series, candidates, from_stdin
from varcli.commands.settings import origin_of, settings
from varcli.errors import UsageError
from varcli.processes import joined, launched, relaunch
from varcli.reporting import notes, progress

if TYPE_CHECKING:
    from varcli.commands.production import Sampled
    from varcli.data.images import Pixels
    from varcli.sampling.batches import BatchSampler


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
    draft: options.Draft = None,
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
    """Make pictures of classes. The same class, seed and settings always give the same picture."""
    _check_together(out=out, grid=grid, scales=scales, resume=resume, as_json=as_json)
    options.check_precision(dtype, quantize)
    _check_fraction(best)
    _check_places(out, grid, scales)
    if nproc > 1 or launched():
        _check_shared(classes, scales)
    if nproc > 1 and not launched():
        raise Exit(relaunch(nproc))
    from varcli.checkpoints.store import load_model  # noqa: PLC0415 - torch
    from varcli.data.outputs import find_output  # noqa: PLC0415 - Pillow
    from varcli.sampling.batches import BatchSampler  # noqa: PLC0415 - torch
    from varcli.sampling.devices import pick_device, pick_dtype, place, precision_reason  # noqa: PLC0415 - torch

    drafts = options.parse_drafts(draft)
    config = settings(checkpoint, preset, cfg=cfg, top_k=top_k, top_p=top_p, smooth=smooth, draft=drafts)
    with joined() as group:
        quiet = quiet or not group.first
        say = notes(quiet)
        where = pick_device(group.device(device))
        precision = quantize or pick_dtype(dtype, where)
        model = load_model(find(checkpoint, progress=not quiet))
        named = where.type if group.count > 1 else str(where)
        origin = origin_of(checkpoint, model.sha256, config, named, precision)
        pictures, known = Series(model.classes, candidates(count, best or 1), seed, origin, say).classes(classes)
        total = None if known is None else known * count
        _check_counts(grid, scales, total)
        output = find_output(out, several=total != 1)
        if group.first:
            output.open(resume)
        with output, progress("pictures", total, quiet) as advance:
            if precision not in (dtype, quantize):
                say(precision_reason(precision, where))
            place(model.tokenizer, model.transformer, where, precision)
            sampler = BatchSampler(model.tokenizer, model.transformer, config, batch_size, say)
            results = Results(output, grid, as_json, quiet, advance)
            sampled: Sampled = partial(_sampled, sampler, scales)
            if best:
                from varcli.commands.election import Election  # noqa: PLC0415 - torch
                from varcli.evaluation.ranking import Classifier  # noqa: PLC0415 - torch

                election = Election(sampler, Classifier(classifier, model.classes, where), count, group)
                pictures = election.chosen(pictures)
                pictures = pictures if group.count == 1 else list(pictures)  # for which all processes are needed
                sampled = sampled if scales else election.pictures
            # What is known beforehand is made in batches across classes, what stdin brings is answered line by line.
            bursts = pictures if total is None else [chain.from_iterable(pictures)]
            Production(sampled, results, group, sampler.batch_size).run(bursts)
        if group.first:
            results.finish(say)


def _sampled(
    sampler: "BatchSampler", scales: Path | None, wanted: Iterable[Picture]
) -> Iterator[tuple[Picture, "Pixels"]]:
    """Yield each picture when it is made, having shown how it grew where that is asked for."""
    if scales is None:
        yield from sampler.pictures(wanted)
        return
    from varcli.data.sheets import save_growing  # noqa: PLC0415 - numpy

    for picture in wanted:
        frames = list(sampler.growth(picture))
        labels = [f"{side} × {side}" for side in sampler.transformer.config.sides]
        save_growing(scales, frames, labels, picture.made)
        yield picture, frames[-1]


# --- what goes together ----------------------------------------------------------------------------


def _check_together(*, out: str | None, grid: Path | None, scales: Path | None, resume: bool, as_json: bool) -> None:
    if out == "-" and as_json:
        raise UsageError("json: with --out -; stdout can carry the pictures or the lines, not both")
    if resume and (grid or scales):
        raise UsageError("resume: with --grid or --scales; they show what this run makes, so one without the other")


def _check_fraction(best: float | None) -> None:
    if best is not None and not 0 < best <= 1:
        raise UsageError(f"best: {best:g}; a fraction above 0, up to 1")


def _check_shared(classes: Sequence[str], scales: Path | None) -> None:
    """Find out whether several processes can share the work."""
    if from_stdin(classes):
        raise UsageError("class: - with several processes; classes from stdin are answered one by one, by one process")
    if scales:
        raise UsageError("scales: with several processes; it shows one picture, which one process makes")


def _check_places(out: str | None, grid: Path | None, scales: Path | None) -> None:
    """Find out whether all that is to be written can be, before anything is downloaded or made."""
    from varcli.data.outputs import check_file, check_output  # noqa: PLC0415 - Pillow

    check_output(out)
    if grid:
        check_file("grid", grid, (".png",))
    if scales:
        check_file("scales", scales, (".png", ".gif"))


def _check_counts(grid: Path | None, scales: Path | None, total: int | None) -> None:
    """Find out whether so many pictures can be shown on a sheet, or growing."""
    if grid and total:
        check_sheet(total)
    if scales and total != 1:
        raise UsageError(f"scales: {total or 'any number of'} pictures; exactly one")
