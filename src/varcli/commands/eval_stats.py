"""`var eval stats`: statistics of images, to measure others against."""

from typing import TYPE_CHECKING

from typer import Exit

from varcli.commands import eval_options, options
from varcli.console import note, result
from varcli.distributed import launch, launched, process_group
from varcli.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


def eval_stats(
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
    """Put down what `var eval --reference` needs of images: mean and covariance of their Inception features."""
    _check(out)
    if nproc > 1 and not launched():
        raise Exit(launch(nproc))
    from varcli.acceleration.devices import pick_device
    from varcli.commands.measuring import Bench
    from varcli.evaluation import comparability
    from varcli.evaluation.extractors import Inception
    from varcli.evaluation.references import find_inception

    with process_group() as group:
        quiet = quiet or not group.is_main
        network = Inception(find_inception(inception, progress=not quiet), pick_device(group.device(device)))
        bench = Bench(network, group, quiet)
        images = bench.images(data, resize, skip_bad)
        bench.keep_statistics(images, features, out, "images")
        if not quiet:
            result(str(out))
            for warning in comparability.skipped(images.skipped):
                note(f"warning: {warning}")


def _check(out: "Path") -> None:
    from varcli.files import check_writable

    if out.suffix.lower() != ".npz":
        raise UsageError(f"out: {out}; a name ending in .npz")
    check_writable(out)
