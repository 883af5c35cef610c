"""`var eval stats`: statistics of pictures, to measure others against."""

from typing import TYPE_CHECKING

from typer import Exit

from varcli.commands import eval_options, options
from varcli.errors import UsageError
from varcli.processes import joined, launched, relaunch
from varcli.reporting import note, result

if TYPE_CHECKING:
    from pathlib import Path


def eval_stats(  # noqa: PLR0917 - options are given by name
    data: eval_options.Data,
    out: eval_options.StatsFile,
    features: eval_options.Features = False,
    resize: eval_options.Resize = None,
    skip_bad: eval_options.SkipBad = False,
    inception: eval_options.InceptionFile = None,
    device: options.Device = "auto",
    nproc: options.Processes = 1,
    quiet: options.Quiet = False,
) -> None:
    """Put down what `var eval --reference` needs of pictures: mean and covariance of their Inception features."""
    _check(out)
    if nproc > 1 and not launched():
        raise Exit(relaunch(nproc))
    from varcli.checkpoints.materials import find_inception  # noqa: PLC0415 - after --help
    from varcli.commands.measuring import Bench  # noqa: PLC0415 - torch
    from varcli.evaluation import guards  # noqa: PLC0415 - torch
    from varcli.evaluation.inception import Inception  # noqa: PLC0415 - torch
    from varcli.sampling.devices import pick_device  # noqa: PLC0415 - torch

    with joined() as group:
        quiet = quiet or not group.first
        network = Inception(find_inception(inception, progress=not quiet), pick_device(group.device(device)))
        bench = Bench(network, group, quiet)
        pictures = bench.pictures(data, resize, skip_bad)
        bench.keep_statistics(pictures, features, out, "pictures")
        if not quiet:
            result(str(out))
            for warning in guards.skipped(pictures.skipped):
                note(f"warning: {warning}")


def _check(out: "Path") -> None:
    from varcli.data.images import check_writable  # noqa: PLC0415 - Pillow

    if out.suffix.lower() != ".npz":
        raise UsageError(f"out: {out}; a name ending in .npz")
    check_writable(out)
