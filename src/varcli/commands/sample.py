"""`var sample`: classes in, images out."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Exit

from varcli.commands import options
from varcli.console import counted, input_lines, notes, result
from varcli.distributed import launch, launched, process_group
from varcli.errors import UsageError

if TYPE_CHECKING:
    from varcli.images.provenance import Provenance


@options.expand
def sample(
    *,
    classes: options.Classes,
    count: options.Count = 1,
    seed: options.Seed = 0,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    settings: options.Settings,
    preset: options.Preset = options.DEFAULT_PRESET,
    out: options.Out = None,
    grid: options.Grid = None,
    growth: options.Growth = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    best_of: options.BestOf = 1,
    decide_at: options.DecideAt = None,
    classifier: options.Classifier = options.DEFAULT_CLASSIFIER,
    nproc: options.Processes = 1,
    resume: options.Resume = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate images of classes. The same class, seed and settings always give the same image."""
    if out == "-" and as_json:
        raise UsageError(options.STDOUT_TWICE)
    if resume and (grid or growth):
        raise UsageError("--resume cannot be used with --grid or --growth, which show only what this run samples")
    if nproc > 1 or launched():
        if "-" in map(str.strip, classes):
            raise UsageError("--class - needs one process: classes from stdin are answered one by one")
        if growth:
            raise UsageError("--growth needs one process: it shows one image")
    from varcli.outputs.open import check_outputs

    check_outputs(out, grid, growth)
    if nproc > 1 and not launched():
        raise Exit(launch(nproc))
    from varcli.pipelines.model import load
    from varcli.pipelines.sample import sample_to

    def written(provenance: "Provenance", path: Path | None, archive: Path | None) -> None:
        if as_json:
            file = path or archive
            result(json.dumps({"path": file and str(file)} | provenance.to_dict(), sort_keys=True))
        elif path and not quiet:
            result(str(path))

    with process_group() as group:
        silent = quiet or not group.is_main
        note = notes(silent)
        model = load(checkpoint, device=group.device(device), dtype=dtype, quantize=quantize, progress=not silent)
        summary = sample_to(
            model,
            classes,
            out,
            model.settings(preset, **settings),
            count=count,
            seed=seed,
            batch_size=batch_size,
            best_of=best_of,
            decide_at=decide_at,
            classifier=classifier,
            grid=grid,
            growth=growth,
            resume=resume,
            lines=input_lines(),
            group=group,
            written=written,
            note=note,
            quiet=silent,
        )
    if not group.is_main:
        return
    options.tell_also(grid if summary.written else None, growth, quiet=quiet)
    if summary.asked > 0 and summary.written == 0:
        note(f"nothing left to do: {counted(summary.asked, 'image')} requested, none missing")
    if summary.unasked:
        others = counted(summary.unasked, "image")
        note(f"{summary.archive} also holds {others} of an earlier run that were not requested")
    if summary.archive and summary.archive.exists() and not as_json and not quiet:
        result(str(summary.archive))
