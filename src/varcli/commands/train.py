"""`var train`: the two stages of training."""

import json
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Exit, Option

from varcli import console
from varcli.commands import options
from varcli.config import (
    TokenizerConfig,
    TokenizerTrainingConfig,
    TrainingConfig,
    TransformerTrainingConfig,
    option_names,
)
from varcli.distributed import launch, launched, process_group
from varcli.evaluation.metrics import FEATURES
from varcli.report.formatting import duration

if TYPE_CHECKING:
    from varcli.training.estimate import TrainingEstimate
    from varcli.training.metrics_log import Metrics

train_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a tokenizer, then a transformer on its tokens. The same command resumes a stopped run.",
)

Data = Annotated[
    list[Path],
    Argument(metavar="DATA...", help="Images with labels: folders of class folders, zips, tar shards or .npz files."),
]
RunFolder = Annotated[
    Path, Option("--out", "-o", metavar="DIR", help="Folder of the run; the same command resumes a stopped one.")
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of both stages that do not change the result."""

    holdout: options.Holdout = 0
    validate_every: Annotated[
        int,
        Option(
            "--validate-every",
            metavar="N",
            min=1,
            help="Validate, write the checkpoint and draw preview images every N steps.",
        ),
    ] = 1000
    save_every: Annotated[
        int,
        Option(
            "--save-every",
            metavar="N",
            min=1,
            help="Save resumable state every N steps; the last two are kept, each four times the size of the weights.",
        ),
    ] = 500
    eval_every: Annotated[
        int,
        Option(
            "--eval-every",
            metavar="N",
            min=0,
            help="Validate and measure FID against the held-out images (a tokenizer's rFID) every N steps; 0 is never.",
        ),
    ] = 0
    eval_images: Annotated[
        int | None,
        Option(
            "--eval-images",
            metavar="N",
            min=2,
            help="Images that --eval-every samples or reconstructs.",
            show_default="as many as are held out, 2000 at most",
        ),
    ] = None
    eval_features: Annotated[
        str,
        Option(
            "--eval-features",
            metavar="NAME",
            help=f"Feature extractor of --eval-every: {', '.join(FEATURES)}.",
        ),
    ] = options.DEFAULT_FEATURES
    inception: options.InceptionFile = None
    dinov2: options.DinoFile = None
    device: options.Device = "auto"
    dtype: options.TrainingDtype = "auto"
    workers: options.Workers = None
    tensorboard: Annotated[bool, Option("--tensorboard", help="Also write figures for TensorBoard.")] = False
    wandb: Annotated[
        str | None,
        Option("--wandb", metavar="PROJECT", help="Also send figures to this project of Weights & Biases."),
    ] = None
    compiled: options.Compiled = False
    nproc: options.Processes = 1
    dry_run: Annotated[bool, Option("--dry-run", help="Print what the run will take, and stop.")] = False
    as_json: options.Json = False
    quiet: options.Quiet = False


@train_app.command("tokenizer")
@options.expand
def tokenizer(
    *,
    data: Data,
    out: RunFolder,
    shape: Annotated[dict[str, Any], TokenizerConfig],
    recipe: Annotated[dict[str, Any], TokenizerTrainingConfig],
    init: Annotated[
        str | None,
        Option(
            "--init",
            metavar="NAME|FILE",
            help="Start from the weights and the shape of this tokenizer or model; "
            "with options of another shape, from the weights that fit.",
        ),
    ] = None,
    lpips_weights: Annotated[
        Path | None,
        Option(
            "--lpips-weights",
            metavar="DIR",
            help="Folder of the downloaded weights of LPIPS or ResNet-50.",
            show_default="torch.hub's cache",
        ),
    ] = None,
    run: RunOptions,
) -> None:
    """Train a tokenizer: images to token maps and back."""
    for name in {"sides", "multipliers"} & shape.keys():
        shape[name] = options.parse_numbers(f"--{name}", shape[name])
    training = TokenizerTrainingConfig(**recipe)
    from varcli.pipelines import train as pipeline

    config = TokenizerConfig(**shape) if init is None else pipeline.tokenizer_shape(init, **shape)

    shared: dict[str, Any] = {"config": config, "training": training, "init": init}
    shared |= {"holdout": run.holdout, "dtype": run.dtype}
    if run.dry_run:
        plan = pipeline.estimate_tokenizer(data, **shared, out=out, device=run.device, note=console.notes(run.quiet))
        _show_estimate(plan, training, run.as_json)
        return
    if run.nproc > 1 and not launched():
        raise Exit(launch(run.nproc))
    with process_group() as group:
        silent = run.quiet or not group.is_main
        figures = pipeline.train_tokenizer(
            data,
            out,
            **shared,
            lpips_weights=lpips_weights,
            validate_every=run.validate_every,
            save_every=run.save_every,
            eval_every=run.eval_every,
            eval_images=run.eval_images,
            eval_features=run.eval_features,
            eval_weights=options.extractor_weights(run.eval_features, run.inception, run.dinov2),
            device=group.device(run.device),
            workers=run.workers,
            compiled=run.compiled,
            tensorboard=run.tensorboard,
            wandb=run.wandb,
            group=group,
            report=_report(run.quiet),
            note=console.notes(silent),
            quiet=silent,
        )
        if group.is_main:
            _finish(figures, out / "tokenizer.safetensors", run)


@train_app.command("transformer")
@options.expand
def transformer(
    *,
    data: Data,
    out: RunFolder,
    tokenizer: Annotated[
        str | None,
        Option(
            "--tokenizer",
            metavar="NAME|FILE",
            help="A tokenizer or model; its weights stay as they are.",
            show_default="that of --init",
        ),
    ] = None,
    init: Annotated[
        str | None,
        Option("--init", metavar="NAME|FILE", help="Fine-tune this model, on its own classes or others."),
    ] = None,
    depth: Annotated[
        int | None,
        Option("--depth", help="Number of blocks, the one dial of the published models.", show_default="16"),
    ] = None,
    width: Annotated[
        int | None, Option("--width", help="Channels, a multiple of 64.", show_default="64 × depth")
    ] = None,
    shared_adaln: Annotated[bool, Option("--shared-adaln", help="One modulation for all blocks, as in d36.")] = False,
    recipe: Annotated[dict[str, Any], TransformerTrainingConfig],
    token_cache: options.TokenCache = None,
    save_dtype: Annotated[
        Literal["fp32", "bf16", "fp16"],
        Option("--save-dtype", help="Precision of the weights in the checkpoint file."),
    ] = "fp32",
    flex_attention: Annotated[
        bool, Option("--flex-attention", help="Attend by FlexAttention, which skips what is masked; for GPUs.")
    ] = False,
    checkpoint_activations: Annotated[
        bool,
        Option("--checkpoint-activations", help="Recompute blocks in the backward pass: less memory, more time."),
    ] = False,
    shard: Annotated[
        bool,
        Option(
            "--shard",
            help="Shard weights and optimizer state over the processes (FSDP2), for models too large for one.",
        ),
    ] = False,
    run: RunOptions,
) -> None:
    """Train a transformer on the token maps of a tokenizer."""
    from varcli.pipelines import train as pipeline

    training = replace(pipeline.default_recipe(depth, init), **recipe)

    shared: dict[str, Any] = {"depth": depth, "width": width, "shared_adaln": shared_adaln, "training": training}
    shared |= {"init": init, "flex_attention": flex_attention, "checkpoint_activations": checkpoint_activations}
    shared |= {"holdout": run.holdout, "dtype": run.dtype}
    if run.dry_run:
        plan = pipeline.estimate_transformer(
            data, tokenizer, **shared, out=out, device=run.device, note=console.notes(run.quiet)
        )
        _show_estimate(plan, training, run.as_json)
        return
    if run.nproc > 1 and not launched():
        raise Exit(launch(run.nproc))
    with process_group() as group:
        silent = run.quiet or not group.is_main
        figures = pipeline.train_transformer(
            data,
            tokenizer,
            out,
            **shared,
            token_cache=token_cache,
            save_dtype=save_dtype,
            shard=shard,
            validate_every=run.validate_every,
            save_every=run.save_every,
            eval_every=run.eval_every,
            eval_images=run.eval_images,
            eval_features=run.eval_features,
            eval_weights=options.extractor_weights(run.eval_features, run.inception, run.dinov2),
            device=group.device(run.device),
            workers=run.workers,
            compiled=run.compiled,
            tensorboard=run.tensorboard,
            wandb=run.wandb,
            group=group,
            report=_report(run.quiet),
            note=console.notes(silent),
            quiet=silent,
        )
        if group.is_main:
            _finish(figures, out / "model.safetensors", run)


@train_app.command("status")
def status(
    folder: Annotated[Path, Argument(metavar="RUN", help="Folder of a run, finished or under way.")],
    as_json: options.Json = False,
) -> None:
    """Compare the figures of a training run with what is normal, and print what is off."""
    from varcli.pipelines.watch import run_status

    found = run_status(folder)
    if as_json:
        console.result(json.dumps(asdict(found)))
        return
    seen = found.figures["images_seen"]
    epochs = f" ({seen / found.images:.1f} epochs)" if found.images else ""
    console.result(f"{found.stage}, step {found.step} of {found.steps}, {console.counted(seen, 'image')} seen{epochs}")
    rows = [("off" if check.off else "ok", check.name, check.found, check.normal) for check in found.checks]
    console.table(("", "check", "found", "normal"), rows)
    for check in found.checks:
        if check.off:
            console.result(f"{check.name}: {check.advice}")
    if not any(name.startswith("validation_") for name in found.figures):
        console.note("labels and the amount of data are checked on held-out images: --holdout N, at each validation")


def _report(quiet: bool) -> Any:
    """Return a function that prints figures, one line on stderr; with a progress bar only those of validations."""

    def report(step: int, steps: int, figures: "Metrics") -> None:
        validated = any(name.startswith("validation_") for name in figures)
        if quiet or (sys.stderr.isatty() and not validated):
            return
        shown = [f"{name} {value:.4g}" for name, value in figures.items() if not _IN_THE_LOG_ONLY.search(name)]
        left = f", {duration(figures['seconds_left'])} left" if "seconds_left" in figures else ""
        console.note(f"step {step}/{steps}: " + ", ".join(shown) + left)

    return report


_IN_THE_LOG_ONLY = re.compile(r"^step$|^images_seen$|^seconds_left$|^memory|_\d+$")
"""Figures that are only logged, among them those of single scales."""


def _finish(figures: "Metrics", checkpoint: Path, run: RunOptions) -> None:
    """Print where the checkpoint is."""
    if run.as_json:
        console.result(json.dumps({"checkpoint": str(checkpoint), **figures}))
    elif not run.quiet:
        console.result(str(checkpoint))


def _show_estimate(found: "TrainingEstimate", recipe: TrainingConfig, as_json: bool) -> None:
    """Print an estimate and the recipe behind it, one line per figure or as JSON."""
    if as_json:
        console.result(json.dumps(asdict(found) | {"recipe": asdict(recipe)}))
        return
    words = []
    for field, name in option_names(recipe).items():
        value = getattr(recipe, field)
        if isinstance(value, bool):
            words += [name] if value else []
        elif value != "":
            words.append(f"{name} {value if isinstance(value, str) else f'{value:g}'}")
    console.result(f"recipe           {' '.join(words)}")
    console.result(f"parameters       {found.parameters / 1e6:.2f} M")
    console.result(f"training set     {console.counted(found.images, 'image')}")
    console.result(f"steps            {found.steps} ({console.counted(found.images_seen, 'image')} seen)")
    console.result(f"operations       {found.flops:.3g} FLOP")
    state, activations = found.state_bytes / 2**30, found.activation_bytes / 2**30
    console.result(f"memory           {state:.2f} GiB state, {activations:.2f} GiB activations")
    console.result(f"speed            {found.images_per_second:.1f} images/s here, {duration(found.seconds)} in all")
    if found.expected_loss is not None:
        console.result(
            f"expected loss    {found.expected_loss:.2f} mean, {found.expected_loss_last:.2f} last scale "
            "(scaling laws: ImageNet 256, the released tokenizer)"
        )
