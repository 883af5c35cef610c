"""Editing: from an image and a region to the edited image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from varcli.classes import RANDOM
from varcli.config import SampleConfig
from varcli.console import progress
from varcli.errors import InputError, UsageError
from varcli.files import write_atomically
from varcli.images.contact_sheet import contact_sheet, save_growth
from varcli.images.decode import square_crop
from varcli.images.editable import SourceImage, read_source_image, source_image
from varcli.images.image import Image
from varcli.images.masks import (
    box_mask,
    check_mask,
    check_mask_image,
    fitted_mask,
    grey_mask,
    marked,
    parse_box,
    parse_margins,
    parse_target,
    transparent_mask,
)
from varcli.images.png16 import Mask, to_8_bits
from varcli.images.provenance import EditProvenance, png_bytes, setting_options
from varcli.images.tiling import Plan, plan_squares, plan_whole
from varcli.outputs.open import open_sink
from varcli.pipelines.model import ClassName, Model
from varcli.pipelines.rejection import check_decision
from varcli.pipelines.requests import SampleRequest, request
from varcli.sampling.editing import EditConfig, Edited, Editor, best
from varcli.sampling.inversion import repaint
from varcli.sampling.reconstruction import encode
from varcli.sampling.sampler import Pixels, decode

ImageInput = str | Path | PIL.Image.Image | np.ndarray[Any, Any] | Image | SourceImage
"""An image as users have it: a file, "-" for standard input, or one in memory, (height, width[, channels]) uint8."""

# --- what to edit ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class EditTask:
    """What to edit, and where."""

    words: tuple[str, ...]
    """The command, its image and its region, as a user types them."""
    image: SourceImage
    mask: Mask
    """(height, width), True where to fill."""
    source: str
    """Name of the results: the image's file name without folder and suffix."""
    inputs: tuple[str, ...]
    """sha256 of the files."""
    notes: tuple[str, ...] = ()
    """Notes for the user: parts of a file that are left out, possible mistakes."""


def read_input(image: ImageInput, name: str = "image") -> SourceImage:
    """Read an image of a file, of standard input, or from memory.

    Raises:
        InputError: it cannot be read, or is an array of another kind.
    """
    if isinstance(image, SourceImage):
        return image
    if isinstance(image, str | Path):
        return read_source_image(str(image))
    if isinstance(image, Image):
        return source_image(image.png(), name)
    content = BytesIO()
    try:
        (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(_levels(image))).save(content, "PNG")
    except TypeError as error:
        kind = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}".strip()
        raise InputError(f"an array of an image must be uint8, (H, W) or (H, W, channels) (got {kind})") from error
    return source_image(content.getvalue(), name)


def _levels(array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    levels = array.astype(np.uint8) * 255 if array.dtype == bool else array
    return levels[:, :, 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels


def crop(model: Model, source: SourceImage) -> Pixels:
    """An image, centre-cropped to a square and resized to the tokenizer's size."""
    return square_crop(PIL.Image.fromarray(source.pixels()), model.tokenizer_config.pixels)


def word(image: ImageInput) -> str:
    """An image as the command line names it; "-" if it is in memory."""
    if isinstance(image, SourceImage):
        return "-" if image.name == "standard input" else image.name
    return str(image) if isinstance(image, str | Path) else "-"


def stem(image: ImageInput) -> str:
    """Name of an image's results: its file name without folder and suffix."""
    return "image" if word(image) == "-" else Path(word(image)).stem


def fill_task(
    command: str,
    image: ImageInput,
    mask: ImageInput | None = None,
    *,
    alpha: bool = False,
    box: str | Sequence[int] | None = None,
    fit_mask: bool = False,
) -> EditTask:
    """Describe filling what a mask, a box or transparency marks.

    Args:
        command: "inpaint" or "edit".
        image: the image.
        mask: white where to fill.
        alpha: fill where the mask, or without one the image, is transparent.
        box: left, top, right, bottom in pixels, or text with percentages.
        fit_mask: resize a mask of another size.

    Raises:
        UsageError: not exactly one of these says where.
        InputError: an image cannot be used, or the mask marks nothing or everything.
    """
    if (box is not None) + (mask is not None or alpha) != 1:
        file, whole = ("--mask", "; --strength edits the whole image") if command == "edit" else ("a mask file", "")
        given = "more than one" if box is not None else "none"
        raise UsageError(f"one of {file}, --alpha and --box must say where to fill (got {given}){whole}")
    if fit_mask and mask is None:
        raise UsageError("--fit-mask needs a mask file: nothing else can have another size")
    if isinstance(image, str) and isinstance(mask, str) and image == mask == "-":
        raise UsageError("standard input holds the image or the mask, not both (got - for each)")
    typed = box if isinstance(box, str) or box is None else ",".join(map(str, box))
    words: list[str] = [command, word(image)]
    if mask is not None:
        words += ["--mask", word(mask)] if command == "edit" else [word(mask)]
    words += ["--alpha"] * alpha + (["--box", typed] if typed is not None else []) + ["--fit-mask"] * fit_mask
    source = read_input(image)
    task = EditTask(
        words=tuple(words),
        image=source,
        mask=box_mask((0, 0, 0, 0), source.size),
        source=stem(image),
        inputs=(source.sha256,),
        notes=source.notes,
    )
    if typed is not None:
        return replace(task, mask=box_mask(parse_box(typed, source.size), source.size))
    marks = source if mask is None else read_input(mask, "mask")
    region = fitted_mask(transparent_mask(marks) if alpha else grey_mask(marks), source.size, marks.name, fit_mask)
    check_mask(region, marks.name)
    doubt = "" if alpha else check_mask_image(marks, region)
    inputs = (source.sha256,) if mask is None else (source.sha256, marks.sha256)
    return replace(task, mask=region, inputs=inputs, notes=(*task.notes, *[doubt] * bool(doubt)))


def outpaint_task(
    image: ImageInput, *, pad: str | Sequence[int] | None = None, to: str | tuple[int, int] | None = None
) -> EditTask:
    """Describe extending an image beyond its borders.

    Args:
        image: the image.
        pad: what to add left, top, right, bottom, in pixels, or text with percentages.
        to: width and height to reach, the image in the middle.

    Raises:
        UsageError: not exactly one of the two is given, or it makes no sense.
        InputError: the image cannot be read.
    """
    if (pad is None) == (to is None):
        raise UsageError("exactly one of --pad and --to must say how far to extend the image")
    source = read_input(image)
    if to is not None:
        typed = to if isinstance(to, str) else f"{to[0]}x{to[1]}"
        words, margins = ("--to", typed), parse_target(typed, source.size)
    else:
        typed = pad if isinstance(pad, str) else ",".join(map(str, pad or ()))
        words, margins = ("--pad", typed), parse_margins(typed, source.size)
    left, top = margins[:2]
    width, height = source.size
    padded = source.padded(margins)
    return EditTask(
        words=("outpaint", word(image), *words),
        image=padded,
        mask=~box_mask((left, top, left + width, top + height), padded.size),
        source=stem(image),
        inputs=(source.sha256,),
        notes=source.notes,
    )


# --- editing ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EditResult:
    """An edited image, and scores of how good it is."""

    image: Image
    chosen: Edited
    """Seam and likelihood, and how the image grew."""
    candidates: Sequence[Edited]
    """All candidates, itself included; with `decide_at`, as they were after that scale."""


def edit_images(
    model: Model,
    task: EditTask,
    label: ClassName,
    seeds: Sequence[int],
    config: SampleConfig,
    rule: EditConfig | None = None,
    *,
    plan: Plan | None = None,
    best_of: int = 1,
    decide_at: int | None = None,
    growing: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[EditResult]:
    """Edit an image once per seed.

    Args:
        model: fills the region.
        task: what to fill.
        label: index or name of the class to paint, "random", or None.
        seeds: of each image's first candidate; the candidates' seeds count up from it.
        config: settings of sampling.
        rule: how the result is composited.
        plan: from `edit_plan`, if known.
        best_of: candidates per image; the one of best seam and likelihood is kept.
        decide_at: scale after which it is chosen, the coarsest being 1; only the chosen one is edited to the end. None
            is after the last.
        growing: also keep the image after each scale.
        advance: called with how many squares were filled, after each batch of them.

    Raises:
        UsageError: the label means several classes, or candidates cannot be judged after this scale.
        InputError: the model does not know it.
        RunError: memory runs out.
    """
    check_decision(decide_at, best_of, len(model.tokenizer_config.sides))
    rule = rule or EditConfig()
    entry, common = model.one_class(label), model.provenance(config)
    plan = plan or edit_plan(model, task, rule)
    models, refiner = model.prepared, model.refiner(config)
    fine = refiner.prepared.transformer if refiner else None
    editor = Editor(models.tokenizer, models.transformer, config, rule, refiner=fine)
    for seed in seeds:
        wanted = request(entry, seed, model.classes, common)
        edit = partial(
            editor.edit, task.image.paint(), plan, wanted.label, scored=best_of > 1, growing=growing, advance=advance
        )
        if decide_at is None:
            candidates = [edit(seed + i) for i in range(best_of)]
            chosen = best(candidates) if best_of > 1 else candidates[0]
        else:
            candidates = [edit(seed + i, growing=False, scales=decide_at) for i in range(best_of)]
            chosen = edit(best(candidates).seed)
        raster = task.image.replaced(chosen.pixels, task.mask)
        yield EditResult(
            Image(raster.levels, _provenance(task, wanted, chosen.seed, rule), raster.info), chosen, candidates
        )


def edit_plan(model: Model, task: EditTask, rule: EditConfig) -> Plan:
    """Return the squares that go through the model."""
    if rule.released_rule:
        return plan_whole(task.mask)
    return plan_squares(task.mask, model.tokenizer_config.pixels, rule.feather or 0)


def _provenance(task: EditTask, wanted: SampleRequest, seed: int, rule: EditConfig) -> EditProvenance:
    feather = [] if rule.feather is None else ["--feather", str(rule.feather)]
    how = [*feather, *["--no-composite"] * (not rule.composite), *["--released-rule"] * rule.released_rule]
    common = replace(wanted.provenance, seed=seed)
    command = (*task.words, *how, *setting_options(common))
    return EditProvenance.of(common, command=command, source=task.source, inputs=task.inputs)


def edit_to(
    model: Model,
    task: EditTask,
    out: str | None,
    label: ClassName,
    config: SampleConfig,
    rule: EditConfig,
    *,
    count: int = 1,
    seed: int = 0,
    best_of: int = 1,
    decide_at: int | None = None,
    grid: Path | None = None,
    growth: Path | None = None,
    note: Callable[[str], None] = lambda line: None,
    quiet: bool = True,
) -> Iterator[tuple[EditResult, Path | None]]:
    """Edit an image and write the results; yields each with its file, None where it went to standard output.

    Args:
        model: fills the region.
        task: what to fill.
        out: a .png file, a folder, or "-" for standard output; None is the current folder.
        label: index or name of the class to paint, "random", or None.
        config: settings of sampling.
        rule: how results are composited.
        count: images, each from its own seed.
        seed: of the first candidate; the next ones count up from it.
        best_of: candidates per image.
        decide_at: after which scale the best is chosen, as for `edit_images`.
        grid: also write a contact sheet, .png: what to fill, and the results.
        growth: also write the image growing, .png or .gif.
        note: takes remarks for the user: parts of a file that are left out, possible mistakes.
        quiet: show no progress bar.

    Raises:
        VarError: the label is unknown, a place cannot be written, or memory runs out.
    """
    check_decision(decide_at, best_of, len(model.tokenizer_config.sides))
    seeds = range(seed, seed + count * best_of, best_of)
    for sentence in task.notes:
        note(sentence)
    model.one_class(label, note)
    model.load_weights(config)
    plan = edit_plan(model, task, rule)
    squares = count * (best_of + (decide_at is not None)) * plan.count
    shown, labels = [marked(task.image.pixels(), task.mask)] if grid else [], ["to fill"]
    with open_sink(out, several=count > 1, archives=False) as sink, progress("squares", squares, quiet) as advance:
        results = edit_images(
            model,
            task,
            label,
            seeds,
            config,
            rule,
            plan=plan,
            best_of=best_of,
            decide_at=decide_at,
            growing=growth is not None,
            advance=advance,
        )
        for result in results:
            provenance = result.image.provenance
            path = sink.add(result.image.raster, provenance)
            if growth:
                _save_growth(growth, result, len(model.tokenizer_config.sides))
            if grid:
                shown.append(to_8_bits(result.chosen.pixels))
                labels.append(f"{provenance.class_name}, seed {provenance.seed}")
            yield result, path
    if grid:
        write_atomically(grid, png_bytes(contact_sheet(shown, labels)))


def _save_growth(path: Path, result: EditResult, scales: int) -> None:
    """Write the image growing: scale by scale, or as a strip with one frame per batch of squares."""
    frames = result.chosen.frames
    if len(frames) > scales and path.suffix.lower() == ".png":
        frames = frames[scales - 1 :: scales]
    save_growth(path, frames, [f"step {i + 1}" for i in range(len(frames))], result.image.provenance)


# --- editing the whole image -----------------------------------------------------------------------


def check_strength(strength: float | None, from_label: ClassName, of_region: Mapping[str, bool]) -> None:
    """Check that options of a region and of the whole image, which has a strength, are not mixed.

    Args:
        strength: None where a region is edited.
        from_label: class that the image shows.
        of_region: options that only a region has, and whether they were given.

    Raises:
        UsageError: they are, or the strength is not between 0 and 1.
    """
    if strength is None:
        if from_label is not None:
            raise UsageError("--from-class needs --strength: where a region is edited, what is in it does not matter")
        return
    if given := [name for name, is_given in of_region.items() if is_given]:
        raise UsageError(f"--strength edits the whole image and cannot be used with {', '.join(given)}")
    if not 0 <= strength <= 1:
        raise UsageError(f"--strength must be between 0 (the reconstruction) and 1 (a new sample) (got {strength:g})")


def edit_whole(
    model: Model,
    image: ImageInput,
    label: ClassName,
    seeds: Sequence[int],
    config: SampleConfig,
    strength: float,
    from_label: ClassName = None,
    *,
    growing: bool = False,
) -> Iterator[tuple[Image, list[Pixels]]]:
    """Edit a whole image once per seed; yield each result, and its images after each scale.

    Args:
        model: edits the image.
        image: of any size; it is centre-cropped to a square and resized to the model's size.
        label: index or name of the class to paint, or None.
        seeds: of the noise.
        config: settings of sampling.
        strength: between 0, the reconstruction, and 1, the sample of this class and seed.
        from_label: class that the image shows, or None.
        growing: also give the image after each scale; otherwise after the last alone.

    Raises:
        UsageError: a label means several classes, `from_label` a random one, or the settings mix codebook vectors
            instead of drawing tokens.
        InputError: the image cannot be read, or the model does not know a class.
    """
    if config.smooth:
        raise UsageError("--smooth mixes codebook vectors, so there is no noise to find: leave it out")
    source = read_input(image)
    entry, from_entry, common = model.one_class(label), model.one_class(from_label), model.provenance(config)
    if from_entry == RANDOM:
        raise UsageError("--from-class must be the class that the image shows, or none (got random)")
    tokenizer, transformer, refiner = model.prepared.tokenizer, model.prepared.transformer, model.refiner(config)
    fine = refiner.prepared.transformer if refiner else None
    tokens, last = encode(tokenizer, crop(model, source)[None]), len(tokenizer.config.sides) - 1
    for seed in seeds:
        wanted, shown = (request(one, seed, model.classes, common) for one in (entry, from_entry))
        results = repaint(tokenizer, transformer, tokens, wanted.label, shown.label, seed, strength, config, fine)
        frames = [decode(tokenizer, result.f_hat)[0] for result in results if growing or result.scale == last]
        from_id = shown.provenance.class_id
        words = ["edit", word(image), "--strength", str(strength)]
        words += [] if from_id is None else ["--from-class", str(from_id)]
        provenance = EditProvenance.of(
            wanted.provenance,
            command=(*words, *setting_options(wanted.provenance)),
            source=stem(image),
            inputs=(source.sha256,),
        )
        yield Image(frames[-1], provenance), frames


def edit_whole_to(
    model: Model,
    image: ImageInput,
    out: str | None,
    label: ClassName,
    config: SampleConfig,
    strength: float,
    from_label: ClassName = None,
    *,
    count: int = 1,
    seed: int = 0,
    grid: Path | None = None,
    growth: Path | None = None,
    quiet: bool = True,
) -> Iterator[tuple[Image, Path | None]]:
    """Edit a whole image and write the results; arguments as for `edit_whole` and `edit_to`."""
    source = read_input(image)
    model.load_weights(config)
    sides = model.tokenizer_config.sides
    shown, labels = [crop(model, source)], [stem(image)]
    with open_sink(out, several=count > 1, archives=False) as sink, progress("images", count, quiet) as advance:
        seeds, growing = range(seed, seed + count), growth is not None
        results = edit_whole(model, source, label, seeds, config, strength, from_label, growing=growing)
        for edited, frames in results:
            path = sink.add(edited.array, edited.provenance)
            if growth:
                save_growth(growth, frames, [f"{side} × {side}" for side in sides], edited.provenance)
            shown.append(edited.array)
            labels.append(f"{edited.class_name}, seed {edited.seed}")
            advance()
            yield edited, path
    if grid:
        write_atomically(grid, png_bytes(contact_sheet(shown, labels)))
