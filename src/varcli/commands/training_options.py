"""Options both training commands take, and what both do with them. No torch at import."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from typer import Argument, Option

from varcli import console
from varcli.config import TrainingConfig
from varcli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from varcli.images.provenance import Pixels
    from varcli.training.estimate import TrainingEstimate
    from varcli.training.loop import Run, Stage
    from varcli.training.metrics_log import Metrics

Recipe = TypeVar("Recipe", bound=TrainingConfig)

Data = Annotated[
    list[Path],
    Argument(metavar="DATA...", help="Images with labels: folders of class folders, zips, tar shards or .npz files."),
]
RunFolder = Annotated[
    Path, Option("--out", "-o", metavar="DIR", help="Folder of the run; the same command goes on with a stopped one.")
]
Holdout = Annotated[
    int, Option("--holdout", metavar="N", min=0, help="Keep the last N images of each class for validation.")
]
SidesText = Annotated[str, Option("--sides", metavar="1,2,3,…", help="Sides of the token maps, coarse to fine.")]
RECIPE = "the recipe's"
Epochs = Annotated[float | None, Option(help="Passes over the training images.", show_default=RECIPE)]
Batch = Annotated[int | None, Option(help="Images an update.", show_default=RECIPE)]
Accumulate = Annotated[
    int | None, Option(metavar="N", help="Compute a batch in N parts, to save memory.", show_default=RECIPE)
]
BaseLr = Annotated[
    float | None,
    Option(help="Learning rate for 256 images an update; it grows with the batch.", show_default=RECIPE),
]
FinalLr = Annotated[float | None, Option(help="Learning rate at the end, as a fraction.", show_default=RECIPE)]
WeightDecay = Annotated[float | None, Option(help="Decoupled weight decay at the start.", show_default=RECIPE)]
Ema = Annotated[float | None, Option(help="Decay of the moving average of weights; 0 is off.", show_default=RECIPE)]
Enlarge = Annotated[
    float | None,
    Option(help="Shorter side before the random crop, as a multiple of the model's side.", show_default=RECIPE),
]
Seed = Annotated[int | None, Option(min=0, help="Of weights, order, crops and all other draws.", show_default=RECIPE)]
Precision = Annotated[Literal["auto", "fp32", "bf16"], Option("--dtype", help="Precision; auto is bf16 where it pays.")]
Store = Annotated[
    Literal["fp32", "bf16", "fp16"], Option("--save-dtype", help="Precision of the weights in the checkpoint file.")
]
Workers = Annotated[
    int | None,
    Option("--workers", min=0, help="Processes that read images ahead.", show_default="one less than cores, 8 at most"),
]
ValidateEvery = Annotated[
    int, Option("--validate-every", metavar="N", min=1, help="Updates between validations, checkpoints and images.")
]
SaveEvery = Annotated[int, Option("--save-every", metavar="N", min=1, help="Updates a killed run loses at most.")]
TensorBoard = Annotated[bool, Option("--tensorboard", help="Also write figures for TensorBoard.")]
DryRun = Annotated[bool, Option("--dry-run", help="Print what the run will take, and stop.")]


def changed(recipe: Recipe, **given: Any) -> Recipe:
    """Return a recipe with the options a user gave in place of its own."""
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def worker_count(workers: int | None) -> int:
    """Return how many processes read ahead."""
    import os

    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores - 1)


def trains_in_bf16(name: str, device: "torch.device", on_cpu: bool) -> bool:
    """Return whether to train in bf16; "auto" does on CUDA, and `on_cpu` where the processor computes in it."""
    import torch

    if name != "auto":
        return name == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return on_cpu and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def reporter(folder: Path, steps: int, quiet: bool, tensorboard: bool) -> "Callable[[int, Metrics], None]":
    """Return what shows figures as they come: a line on stderr and, if asked for, TensorBoard.

    Raises:
        UsageError: TensorBoard is asked for and not installed.
    """
    writer_class = _tensorboard() if tensorboard else None
    writers: list[Any] = []

    def report(step: int, figures: "Metrics") -> None:
        if writer_class is not None:
            if not writers:  # only now is the folder known to be this run's; what a killed run wrote later goes
                writers.append(writer_class(str(folder / "tensorboard"), purge_step=step))
            for name, value in figures.items():
                writers[0].add_scalar(name.replace("validation_", "validation/"), value, step)
            writers[0].flush()
        if not quiet:
            shown = [f"{name} {value:.4g}" for name, value in figures.items() if name not in ("step", "images_seen")]
            console.note(f"update {step}/{steps}: " + ", ".join(shown))

    return report


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("tensorboard: not installed; pip install 'varcli[tensorboard]'") from None
    return SummaryWriter


def write_sheet(folder: Path, step: int, images: "Sequence[Pixels]", labels: Sequence[str], columns: int) -> None:
    """Write the contact sheet of an update into a run's folder of images."""
    from varcli.files import write_atomically
    from varcli.images.contact_sheet import contact_sheet
    from varcli.images.provenance import png_bytes

    write_atomically(folder / f"{step:07d}.png", png_bytes(contact_sheet(images, labels, columns)))


def finish(stage: "Stage", run: "Run", written: Path, as_json: bool) -> None:
    """Train to the end and print where the checkpoint is."""
    from varcli.training.loop import train

    figures = train(stage, run)
    console.result(json.dumps({"checkpoint": str(written), **figures}) if as_json else str(written))


def show_plan(plan: "TrainingEstimate", recipe: TrainingConfig, as_json: bool) -> None:
    """Print a plan and the settings behind it, a line a figure or as JSON."""
    if as_json:
        console.result(json.dumps(asdict(plan) | {"recipe": asdict(recipe)}))
        return
    duration = f"{plan.seconds / 3600:.1f} hours" if plan.seconds >= 3600 else f"{plan.seconds / 60:.1f} minutes"
    settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in asdict(recipe).items())
    console.result(f"recipe           {settings}")
    console.result(f"parameters       {plan.parameters / 1e6:.2f} M")
    console.result(f"training set     {plan.images} images")
    console.result(f"updates          {plan.steps} ({plan.images_seen} images seen)")
    console.result(f"operations       {plan.flops:.3g} FLOP")
    state, activations = plan.state_bytes / 2**30, plan.activation_bytes / 2**30
    console.result(f"memory           {state:.2f} GiB state, {activations:.2f} GiB activations")
    console.result(f"speed            {plan.images_per_second:.1f} images/s here, {duration} in all")
    if plan.expected_loss is not None:
        console.result(
            f"expected loss    {plan.expected_loss:.2f} mean, {plan.expected_loss_last:.2f} last scale "
            "(scaling laws: ImageNet 256, the released tokenizer)"
        )
