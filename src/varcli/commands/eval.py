"""`var eval`: FID, inception score, KID, precision and recall that can be compared with the paper's."""

import json
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from varcli.commands import options
from varcli.config import option
from varcli.console import input_lines, notes, result, table
from varcli.distributed import launch, launched, process_group
from varcli.errors import UsageError
from varcli.evaluation.metrics import FEATURES, METRICS, check_reconstructed

if TYPE_CHECKING:
    from varcli.evaluation.results import Result

Resize = Annotated[
    int | None,
    Option("--resize", metavar="SIDE", min=1, help="Crop and resize images to this many pixels per side, as ADM does."),
]
Features = Annotated[
    str,
    Option(
        "--features",
        metavar="NAME",
        help=f"Feature extractor: {', '.join(FEATURES)}; none, with --tokenizer, measures PSNR, SSIM and LPIPS alone.",
    ),
]
Metrics = Annotated[
    dict[str, Any],
    make_dataclass(
        "Metrics",
        [(f"metric_{row.name}", bool, option(False, row.help, f"--{row.name}")) for row in METRICS.values()],
    ),
]
"""One flag per row of the metrics."""


@options.expand
def evaluate(
    *,
    paths: Annotated[
        list[str] | None,
        Argument(
            metavar="PATH",
            help="Existing images: folders, zips, .npz (arr_0), WebDataset .tar, image files, or - for paths on "
            "stdin. Without any, images are sampled with the checkpoint.",
        ),
    ] = None,
    metrics: Metrics,
    features: Features = options.DEFAULT_FEATURES,
    num_images: Annotated[
        int | None,
        Option(
            "--num-images",
            "-n",
            min=2,
            help="Images to sample, the same number per class.",
            show_default="50000, for a checkpoint without published figures as many as the reference has",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        Option(
            "--reference",
            "-r",
            metavar="NAME|PATH",
            help="What to measure against: imagenet-256, imagenet-512 or tiny64, an .npz of statistics, or images.",
            show_default="the checkpoint's; for existing images the one of their size",
        ),
    ] = None,
    tokenizer: Annotated[
        bool, Option("--tokenizer", help="Measure the checkpoint's tokenizer instead, on images encoded and decoded.")
    ] = False,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    seed: options.Seed = 0,
    settings: options.Settings,
    preset: options.Preset = "metrics",
    best_of: options.BestOf = 1,
    decide_at: options.DecideAt = None,
    classifier: options.Classifier = options.DEFAULT_CLASSIFIER,
    resize: Resize = None,
    skip_bad: options.SkipBad = False,
    inception: options.InceptionFile = None,
    dinov2: options.DinoFile = None,
    lpips_weights: Annotated[
        Path | None,
        Option(
            "--lpips-weights",
            metavar="DIR",
            help="Folder of LPIPS's two weight files.",
            show_default="torch.hub's cache",
        ),
    ] = None,
    save_stats: Annotated[
        Path | None, Option("--save-stats", metavar="FILE", help="Also write the images' statistics, .npz.")
    ] = None,
    save_images: Annotated[
        str | None, Option("--save-images", metavar="PATH", help="Also write sampled images: a folder, .npz or .tar.")
    ] = None,
    out: Annotated[
        Path | None,
        Option("--out", "-o", metavar="FILE", help="Also write the result, .json, with some images, for `var report`."),
    ] = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    nproc: options.Processes = 1,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure images: those that a checkpoint samples, 50 per class as in the paper, or those at PATH.

    Without a metric's option: FID and inception score.

    If it is killed, the same command resumes it, except with --tokenizer.
    """
    sampled = not (paths or tokenizer)
    only_sampled = {
        "num-images": num_images,
        "save-images": save_images,
        "best-of": best_of if best_of > 1 else None,
        "decide-at": decide_at,
    }
    for name, value in {**only_sampled, **settings}.items():
        if value is not None and not sampled:
            raise UsageError(f"--{name.replace('_', '-')} is for images to be sampled, not for images that exist")
    if resize and sampled and not reference:
        raise UsageError(
            "--resize is for images that exist, and for those of --reference; sampled ones have the model's size"
        )
    chosen = tuple(name.removeprefix("metric_") for name in metrics)
    if tokenizer:
        check_reconstructed(chosen)
    read = [*(paths or []), *([reference] if reference else [])]
    _check_outputs(out, save_stats, save_images, read, shared=nproc > 1 or launched())
    if nproc > 1 and not launched():
        raise Exit(launch(nproc))
    from varcli.pipelines import evaluate as pipeline
    from varcli.pipelines.model import load

    def report(found: "Result") -> None:
        _report(found, out, as_json=as_json, quiet=quiet)

    with process_group() as group:
        silent = quiet or not group.is_main
        where = group.device(device)
        model = None
        if sampled or tokenizer:
            model = load(checkpoint, device=where, dtype=dtype, quantize=quantize, progress=not silent)
        pipeline.evaluate(
            model or paths or [],
            chosen or None,
            reference=reference,
            tokenizer=tokenizer,
            num_images=num_images,
            seed=seed,
            config=model.settings(preset, **settings) if model else None,
            best_of=best_of,
            decide_at=decide_at,
            classifier=classifier,
            batch_size=batch_size,
            paths=paths or [],
            resize=resize,
            skip_bad=skip_bad,
            lines=input_lines(),
            features=features,
            weights=options.extractor_weights(features, inception, dinov2),
            lpips_weights=lpips_weights,
            device=where,
            save_stats=save_stats,
            save_images=save_images,
            thumbnails=out is not None,
            group=group,
            report=report,
            note=notes(silent),
            quiet=silent,
        )


def eval_stats(
    *,
    data: Annotated[list[str], Argument(metavar="PATH", help="Folders, zips, .npz, .tar, image files, or - .")],
    out: Annotated[Path, Option("--out", "-o", metavar="FILE", help="The .npz to write.")],
    features: Features = options.DEFAULT_FEATURES,
    keep_features: Annotated[
        bool, Option("--keep-features", help="Also keep each image's features, for KID, precision and recall.")
    ] = False,
    resize: Resize = None,
    skip_bad: options.SkipBad = False,
    inception: options.InceptionFile = None,
    dinov2: options.DinoFile = None,
    device: options.Device = "auto",
    nproc: options.Processes = 1,
    quiet: options.Quiet = False,
) -> None:
    """Compute reference statistics for `var eval --reference`: mean and covariance of the images' features."""
    from varcli.files import check_not_read
    from varcli.outputs.open import check_file

    check_file("out", out, (".npz",))
    check_not_read("out", out, data)
    if nproc > 1 and not launched():
        raise Exit(launch(nproc))
    from varcli.pipelines.evaluate import compute_statistics

    with process_group() as group:
        silent = quiet or not group.is_main
        note = notes(silent)
        warnings = compute_statistics(
            data,
            out,
            keep_features=keep_features,
            resize=resize,
            skip_bad=skip_bad,
            lines=input_lines(),
            features=features,
            weights=options.extractor_weights(features, inception, dinov2),
            device=group.device(device),
            group=group,
            note=note,
            quiet=silent,
        )
        if not silent:
            result(str(out))
        for warning in warnings:
            note(f"warning: {warning}")


def _check_outputs(
    out: Path | None, save_stats: Path | None, save_images: str | None, read: Sequence[str], *, shared: bool
) -> None:
    """Check that everything to be written can be, before anything is downloaded or computed."""
    from varcli.files import check_not_read
    from varcli.outputs.open import check_file, check_sink, find_sink
    from varcli.outputs.sinks import StreamSink

    if save_images:
        check_sink(save_images)
        check_not_read("save-images", Path(save_images), read)
        sink = find_sink(save_images, several=True)
        if isinstance(sink, StreamSink):
            raise UsageError(f"--save-images must be a folder, .npz or .tar: stdout has the result (got {save_images})")
        if sink.archive and shared:
            raise UsageError(f"--save-images must be a folder with several processes (got {save_images})")
    for name, path, suffix in (("out", out, ".json"), ("save-stats", save_stats, ".npz")):
        if path:
            check_file(name, path, (suffix,))
            check_not_read(name, path, read)


def _report(found: "Result", out: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Write and print the result, and print its warnings."""
    if out:
        from varcli.files import write_atomically

        write_atomically(out, (json.dumps(found.facts(), indent=1, sort_keys=True) + "\n").encode())
    if as_json:
        facts = found.facts()
        del facts["images"]  # thumbnails are for the file
        result(json.dumps(facts, sort_keys=True))
    else:
        table(("", ""), list(found.lines()))
    for warning in found.warnings:
        notes(quiet)(f"warning: {warning}")
