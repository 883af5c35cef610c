"""`var scaling`: how loss falls with size, data and compute."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Exit, Option

from varcli import console
from varcli.commands import options
from varcli.commands.train import Data
from varcli.config import TransformerTrainingConfig
from varcli.distributed import launch, launched, process_group
from varcli.errors import UsageError

scaling_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train models of several sizes, and fit scaling laws to them.",
)


@scaling_app.command("run")
@options.expand
def run(
    *,
    data: Data,
    tokenizer: Annotated[str, Option("--tokenizer", metavar="NAME|FILE", help="A tokenizer or model.")],
    out: Annotated[
        Path,
        Option("--out", "-o", metavar="DIR", help="Folder of the runs; the same command resumes stopped ones."),
    ],
    depths: Annotated[str, Option("--depths", metavar="2,3,…", help="Depths of the models to train.")] = "2,3,4,5,6",
    passes: Annotated[
        str, Option("--passes", metavar="1,2,…", help="Numbers of epochs; each depth is trained once for each of them.")
    ] = "1,2,4",
    recipe: Annotated[
        dict[str, Any],
        TransformerTrainingConfig,
        "batch",
        "accumulate",
        "base_lr",
        "final_lr",
        "weight_decay",
        "final_weight_decay",
        "ema",
        "enlarge",
        "flip",
        "clip_grad",
        "seed",
        "scale_weight",
        "gamma_init",
        "crops",
    ],
    holdout: Annotated[
        int, Option("--holdout", metavar="N", min=1, help="Measure on the last N images of each class.")
    ] = 10,
    token_cache: options.TokenCache = None,
    save_every: Annotated[
        int, Option("--save-every", metavar="N", min=1, help="Save resumable state of a run every N steps.")
    ] = 500,
    device: options.Device = "auto",
    dtype: options.TrainingDtype = "auto",
    workers: options.Workers = None,
    compiled: options.Compiled = False,
    nproc: options.Processes = 1,
    quiet: options.Quiet = False,
) -> None:
    """Train models of several depths for several numbers of epochs, each to the end of its schedule."""
    sizes = options.parse_numbers("--depths", depths)
    try:
        epochs = [float(part) for part in passes.split(",")]
    except ValueError:
        raise UsageError(f"--passes must be numbers separated by commas, such as 1,2,4 (got {passes})") from None
    if nproc > 1 and not launched():
        raise Exit(launch(nproc))
    from varcli.pipelines.scaling import train_ladder

    def report(folder: Path) -> Any:
        def say(step: int, steps: int, figures: dict[str, float]) -> None:
            if not quiet and "validation_loss" in figures:
                loss, last = figures["validation_loss"], figures["validation_loss_last"]
                console.note(f"{folder.name} step {step}/{steps}: held-out loss {loss:.3f}, last scale {last:.3f}")

        return say

    with process_group() as group:
        silent = quiet or not group.is_main
        folders = train_ladder(
            data,
            tokenizer,
            out,
            depths=sizes,
            epochs=epochs,
            recipe=recipe,
            token_cache=token_cache,
            holdout=holdout,
            save_every=save_every,
            device=group.device(device),
            dtype=dtype,
            workers=workers,
            compiled=compiled,
            group=group,
            report=report,
            note=console.notes(silent),
            quiet=silent,
        )
        if group.is_main:
            for folder in folders:
                console.result(str(folder))


@scaling_app.command("fit")
def fit(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Folders of finished `var train transformer` runs.")],
    count: Annotated[
        Literal["all", "blocks"],
        Option("--count", help="What N counts: all parameters, or the blocks alone as in the paper."),
    ] = "all",
    figure: Annotated[Path | None, Option("--figure", metavar="FILE", help="Also draw the laws, .png or .svg.")] = None,
    depth: Annotated[
        int | None, Option("--depth", min=1, help="Also predict the figures of a model of this depth.")
    ] = None,
    images: Annotated[
        int | None,
        Option("--images", min=1, help="Images seen by the predicted model.", show_default="the most of the runs"),
    ] = None,
    intervals: Annotated[bool, Option("--intervals/--no-intervals", help="Estimate 95 % intervals.")] = True,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fit L(N, D) = E + A / N^α + B / D^β, and the paper's (β X)^α in parameters and in compute, to finished runs."""
    if figure:
        from varcli.outputs.open import check_file

        check_file("figure", figure, (".png", ".svg"))
    if images and not depth:
        raise UsageError("--images needs --depth: it is how many images the predicted model sees")
    from varcli.pipelines.scaling import draw, fit_scaling, predict

    laws = fit_scaling(runs, count, intervals)
    facts = laws.facts()
    if depth:
        seen = images or max(run.images_seen for run in laws.runs)
        facts["predicted"] = {"depth": depth, "images_seen": seen, **predict(laws, depth, seen)}
    if figure:
        draw(laws, figure)
    if as_json:
        console.result(json.dumps(facts))
    else:
        _print(facts)
    for note in laws.notes:
        console.notes(quiet)(note)


def _print(facts: dict[str, Any]) -> None:
    """Print runs and laws as tables."""
    rows = [
        (
            run["name"],
            f"{run['parameters'] / 1e6:.3g} M",
            f"{run['tokens']:.3g}",
            f"{run['images_seen'] / run['images']:.3g}" if run["images"] else "–",
            f"{run['pflops']:.3g}",
            *(f"{run[name]:.4f}" for name in ("loss", "loss_last", "error", "error_last")),
        )
        for run in facts["runs"]
    ]
    console.table(("run", "N", "tokens D", "epochs", "PFlops", "loss", "last", "error", "last"), rows)
    joint = [
        (name, *(_with_interval(law, constant) for constant in ("E", "alpha", "beta")))
        for name, law in facts["laws"].items()
    ]
    console.table(("E + A / N^α + B / D^β", "E", "α", "β"), joint)
    powers = [
        (
            f"{name} in {'N' if kind == 'parameters' else 'C'}",
            f"({law[kind]['beta']:.3g} X)^{law[kind]['alpha']:.4f}",
            f"{law[kind]['correlation']:.4f}",
            f"({law['paper'][kind]['beta']:g} X)^{law['paper'][kind]['alpha']:g}",
        )
        for name, law in facts["laws"].items()
        for kind in ("parameters", "compute")
    ]
    console.table(("(β X)^α", "fitted", "correlation", "paper"), powers)
    if "predicted" in facts:
        figures = ", ".join(f"{name} {facts['predicted'][name]:.4f}" for name in facts["laws"])
        console.result(
            f"depth {facts['predicted']['depth']}, {facts['predicted']['images_seen']} images seen: {figures}"
        )


def _with_interval(law: dict[str, Any], constant: str) -> str:
    """A constant with its interval."""
    value = f"{law['joint'][constant]:.3g}"
    if constant not in law["intervals"]:
        return value
    low, high = law["intervals"][constant]
    return f"{value} [{low:.3g}, {high:.3g}]"
