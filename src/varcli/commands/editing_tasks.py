"""What is to be edited, from what the user names: images, masks, boxes, margins."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from varcli.errors import UsageError

if TYPE_CHECKING:
    from varcli.images.editable import SourceImage
    from varcli.images.masks import Mask


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be edited, and where."""

    words: tuple[str, ...]
    """The command and what it names: how a user would say this again."""
    photograph: "SourceImage"
    mask: "Mask"
    source: str
    """What to call the results: the image's name without folders and ending."""
    inputs: tuple[str, ...]
    """sha256 of the files."""
    shown: bool = False
    """Whether what is filled becomes opaque."""
    side: int | None = None
    """Of the squares that go through the model, in the image's pixels; None is the hole with its context."""


def inpainting(
    words: tuple[str, ...], image: str, mask: str | None, *, alpha: bool, box: str | None, fit: bool
) -> Task:
    """Return the task to fill what a mask, a box or the image's own transparency marks.

    Args:
        words: the command with its image and mask.
        image: the image's file, or ``-``.
        mask: the mask's file, or ``-``.
        alpha: it is the alpha channel that marks, of the mask or, without one, of the image.
        box: as typed.
        fit: a mask of another size is resized.

    Raises:
        UsageError: not exactly one of them is given.
        InputError: a file cannot be used, or marks nothing or everything.
    """
    from varcli.images.editable import read_source_image
    from varcli.images.masks import box_mask, check_mask, fitted_mask, grey_mask, parse_box, transparent_mask

    if (box is not None) + (mask is not None or alpha) != 1:
        raise UsageError("mask: exactly one of a mask file, --alpha and --box says where; see --help")
    if fit and mask is None:
        raise UsageError("fit-mask: without a mask file; only one of those can have another size")
    if image == mask == "-":
        raise UsageError("mask: - like the image; standard input holds one of them")
    words += (*["--alpha"] * alpha, *(["--box", box] if box is not None else []), *["--fit-mask"] * fit)
    given = read_source_image(image)
    task = Task(
        words=words,
        photograph=given,
        mask=box_mask((0, 0, 0, 0), given.size),
        source="image" if image == "-" else Path(image).stem,
        inputs=(given.sha256,),
    )
    if box is not None:
        return replace(task, mask=box_mask(parse_box(box, given.size), given.size))
    other = given if mask is None else read_source_image(mask)
    marks = fitted_mask(transparent_mask(other) if alpha else grey_mask(other), given.size, other.name, fit)
    check_mask(marks, other.name)
    inputs = (given.sha256,) if mask is None else (given.sha256, other.sha256)
    return replace(task, mask=marks, inputs=inputs, shown=mask is None)


def outpainting(image: str, *, pad: str | None, to: str | None) -> Task:
    """Return the task to go on beyond an image's edges.

    Raises:
        UsageError: not exactly one of margins and size is given, or they make no sense.
        InputError: the image cannot be used.
    """
    from varcli.images.editable import read_source_image
    from varcli.images.masks import box_mask, parse_margins, parse_target

    if (pad is None) == (to is None):
        raise UsageError("size: exactly one of --pad and --to says how far")
    given = read_source_image(image)
    margins = parse_target(to, given.size) if to is not None else parse_margins(str(pad), given.size)
    left, top = margins[:2]
    width, height = given.size
    larger = given.padded(margins)
    return Task(
        words=("outpaint", image, *(("--to", to) if to is not None else ("--pad", str(pad)))),
        photograph=larger,
        mask=~box_mask((left, top, left + width, top + height), larger.size),
        source="image" if image == "-" else Path(image).stem,
        inputs=(given.sha256,),
        shown=True,
        side=min(given.size),
    )
