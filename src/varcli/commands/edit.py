"""`var inpaint`, `var outpaint` and `var edit`: an image in, the edited image out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from varcli.commands import options
from varcli.console import notes, result
from varcli.errors import UsageError

if TYPE_CHECKING:
    from varcli.pipelines.edit import EditResult, EditTask

MaskFile = Annotated[
    str | None,
    Argument(metavar="[MASK]", help="A grey image of the same size, white where to fill.", show_default=False),
]
MaskOption = Annotated[
    str | None, Option("--mask", metavar="FILE", help="A grey image of the same size, white where to change.")
]
Alpha = Annotated[bool, Option("--alpha", help="Fill where the mask, or without one the image, is transparent.")]
Box = Annotated[
    str | None,
    Option("--box", metavar="L,T,R,B", help="Instead of a mask: a box in pixels (16,0,48,32) or percent (25%,0%,…)."),
]
FitMask = Annotated[bool, Option("--fit-mask", help="Resize a mask of another size to the image's.")]
ClassName = Annotated[
    str,
    Option("--class", "-c", metavar="CLASS", help="What to paint: index (207), name ('golden retriever') or none."),
]


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """The options that the three commands share."""

    count: Annotated[int, Option("--count", "-n", min=1, help="Number of images, each from its own seed.")] = 1
    seed: Annotated[int, Option("--seed", min=0, help="Seed of the first image; the next ones count up from it.")] = 0
    best_of: Annotated[
        int,
        Option(
            "--best-of",
            metavar="N",
            min=1,
            help="Generate N candidates per image and keep the one with the best seam and likelihood.",
        ),
    ] = 1
    decide_at: options.DecideAt = None
    feather: Annotated[
        int | None,
        Option(
            "--feather",
            metavar="PIXELS",
            min=0,
            help="Width over which new fades into old outside the mask, in pixels; beyond it nothing changes.",
            show_default="half a token of the hole's square",
        ),
    ] = None
    composite: Annotated[
        bool,
        Option(
            "--composite/--no-composite",
            help="Take kept pixels from the image, or the whole result from the model's decoder.",
        ),
    ] = True
    released_rule: Annotated[
        bool,
        Option(
            "--released-rule",
            help="Follow the released demonstration exactly: its rule for kept tokens, and no compositing.",
        ),
    ] = False
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT
    settings: options.Settings
    out: options.ImagesOut = None
    grid: Annotated[
        Path | None,
        Option("--grid", metavar="FILE", help="Also write a contact sheet: what to fill, and the results, .png."),
    ] = None
    growth: options.Growth = None
    device: options.Device = "auto"
    dtype: options.Dtype = "auto"
    as_json: options.Json = False
    quiet: options.Quiet = False


@options.expand
def inpaint(
    *,
    image: options.ImageArgument,
    mask: MaskFile = None,
    alpha: Alpha = False,
    box: Box = None,
    fit_mask: FitMask = False,
    class_name: ClassName = "none",
    shared: EditOptions,
) -> None:
    """Fill a hole in an image so that it goes with the rest. Pixels away from the hole stay bit-identical."""
    _check(shared, image, mask)
    from varcli.pipelines.edit import fill_task

    _run(fill_task("inpaint", image, mask, alpha=alpha, box=box, fit_mask=fit_mask), class_name, shared)


@options.expand
def outpaint(
    *,
    image: options.ImageArgument,
    pad: Annotated[
        str | None,
        Option("--pad", metavar="L,T,R,B", help="What to add on each side, in pixels or percent of the image."),
    ] = None,
    to: Annotated[
        str | None, Option("--to", metavar="WxH", help="Size to reach, such as 1024x256, the image in the middle.")
    ] = None,
    class_name: ClassName = "none",
    shared: EditOptions,
) -> None:
    """Extend an image beyond its borders, by any amount. In the image itself only pixels near them change."""
    _check(shared, image)
    from varcli.pipelines.edit import outpaint_task

    _run(outpaint_task(image, pad=pad, to=to), class_name, shared)


@options.expand
def edit(
    *,
    image: options.ImageArgument,
    class_name: ClassName,
    mask: MaskOption = None,
    alpha: Alpha = False,
    box: Box = None,
    fit_mask: FitMask = False,
    strength: Annotated[
        float | None,
        Option(
            "--strength",
            metavar="0…1",
            help="Edit the whole image, not a region, this strongly: 0 is its reconstruction, 1 is a new sample.",
        ),
    ] = None,
    from_class: Annotated[
        str | None,
        Option(
            "--from-class", metavar="CLASS", help="With --strength: class that the image shows.", show_default="none"
        ),
    ] = None,
    shared: EditOptions,
) -> None:
    """Repaint a region of an image with an object of another class, or, with --strength, the whole image.

    Pixels away from a region stay bit-identical. A whole image is centre-cropped and resized to
    the model's size.
    """
    _check(shared, image, mask)
    from varcli.pipelines.edit import check_strength, edit_whole_to, fill_task, read_input

    of_region = {
        "--mask": mask is not None,
        "--alpha": alpha,
        "--box": box is not None,
        "--fit-mask": fit_mask,
        "--best-of": shared.best_of > 1,
        "--decide-at": shared.decide_at is not None,
        "--feather": shared.feather is not None,
        "--no-composite": not shared.composite,
        "--released-rule": shared.released_rule,
    }
    check_strength(strength, from_class, of_region)
    if strength is None:
        _run(fill_task("edit", image, mask, alpha=alpha, box=box, fit_mask=fit_mask), class_name, shared)
        return
    from varcli.pipelines.model import load

    source = read_input(image)
    model = load(shared.checkpoint, device=shared.device, dtype=shared.dtype, progress=not shared.quiet)
    results = edit_whole_to(
        model,
        source,
        shared.out,
        class_name,
        model.settings(options.DEFAULT_PRESET, **shared.settings),
        strength,
        from_class,
        count=shared.count,
        seed=shared.seed,
        grid=shared.grid,
        growth=shared.growth,
        quiet=shared.quiet,
    )
    for edited, path in results:
        _print(path, edited.provenance.to_dict(), shared)
    options.tell_also(shared.grid, shared.growth, quiet=shared.quiet)


def _check(shared: EditOptions, *inputs: str | None) -> None:
    """Check options that exclude each other, and that files can be written, before any work is done."""
    from varcli.outputs.open import check_outputs

    options.check_image_outputs(shared.out, shared.as_json, shared.growth, shared.count)
    if shared.released_rule and (shared.feather is not None or not shared.composite):
        raise UsageError("--released-rule cannot be used with --feather or --no-composite: it composites nothing")
    if shared.feather is not None and not shared.composite:
        raise UsageError("--feather cannot be used with --no-composite: only a composite has a seam")
    check_outputs(shared.out, shared.grid, shared.growth, archives=False, inputs=list(filter(None, inputs)))


def _run(task: "EditTask", class_name: str, shared: EditOptions) -> None:
    from varcli.pipelines.edit import edit_to
    from varcli.pipelines.model import load
    from varcli.sampling.editing import EditConfig

    model = load(shared.checkpoint, device=shared.device, dtype=shared.dtype, progress=not shared.quiet)
    results = edit_to(
        model,
        task,
        shared.out,
        class_name,
        model.settings(options.DEFAULT_PRESET, **shared.settings),
        EditConfig(feather=shared.feather, composite=shared.composite, released_rule=shared.released_rule),
        count=shared.count,
        seed=shared.seed,
        best_of=shared.best_of,
        decide_at=shared.decide_at,
        grid=shared.grid,
        growth=shared.growth,
        note=notes(shared.quiet),
        quiet=shared.quiet,
    )
    for edited, path in results:
        _print(path, edited.image.provenance.to_dict() | _scores(edited), shared)
    options.tell_also(shared.grid, shared.growth, quiet=shared.quiet)


def _print(path: Path | None, facts: dict[str, Any], shared: EditOptions) -> None:
    """Print where a result is, or with --json all facts of it."""
    if shared.as_json:
        result(json.dumps({"path": path and str(path)} | facts, sort_keys=True))
    elif path and not shared.quiet:
        result(str(path))


def _scores(edited: "EditResult") -> dict[str, Any]:
    """Scores of an edit, and of the candidates it was chosen from."""
    chosen = edited.chosen
    if len(edited.candidates) == 1:
        return {"seam": chosen.seam}
    candidates = [
        {"seed": one.seed, "seam": one.seam, "log_likelihood": one.log_likelihood} for one in edited.candidates
    ]
    return {"seam": chosen.seam, "log_likelihood": chosen.log_likelihood, "candidates": candidates}
