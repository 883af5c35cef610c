"""`var reconstruct`: images through the tokenizer and back, and what that costs."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varcli.commands import editing_options, options
from varcli.commands.tokenizing import Loaded, fitted, load, stem
from varcli.console import note, progress, result, table
from varcli.errors import UsageError

if TYPE_CHECKING:
    from varcli.images.editable import SourceImage
    from varcli.images.provenance import Pixels


def reconstruct(  # noqa: PLR0917 - options are given by name
    images: editing_options.Images,
    out: editing_options.RebuiltOut = None,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    grid: editing_options.PairsGrid = None,
    scales: options.Scales = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Take images through the tokenizer and back; tell the PSNR of each and the bits a pixel its tokens take.

    An image's largest square in the middle is taken, in the tokenizer's size, as for training.
    """
    from varcli.images.editable import read_source_image
    from varcli.outputs.open import open_sink

    _check_together(len(images), out, grid, scales, as_json)
    given = [read_source_image(image) for image in images]
    loaded = load(checkpoint, device, quiet)
    pairs: list[tuple[Pixels, Pixels]] = []
    rows = []
    place = nullcontext() if out is None else open_sink(out, several=len(images) > 1)
    with place as output, progress("images", len(images), quiet) as advance:
        for number, (image, photograph) in enumerate(zip(images, given, strict=True)):
            before, after, facts = _there_and_back(loaded, photograph, scales)
            path = None
            if output is not None:
                made = loaded.made(("reconstruct", image), stem(image), number, (photograph.sha256,))
                path = output.add(after, made)
            rows.append({"image": image, "path": path and str(path)} | facts)
            pairs.append((before, after))
            advance()
    if grid:
        _sheet(grid, pairs, rows)
    _report(rows, as_json=as_json, aside=out == "-")


def _there_and_back(
    loaded: Loaded, photograph: "SourceImage", scales: Path | None
) -> tuple["Pixels", "Pixels", dict[str, float]]:
    """Return an image in the tokenizer's size, its reconstruction and figures."""
    from varcli.images.contact_sheet import save_growth
    from varcli.sampling.reconstruction import bits_per_pixel, encode, growth, psnr, rebuilt

    tokenizer = loaded.tokenizer
    before = fitted(photograph, tokenizer.config.pixels)
    tokens = encode(tokenizer, before)
    after = rebuilt(tokenizer, tokens)
    if scales:
        frames = list(growth(tokenizer, tokens))
        sides = tokenizer.config.sides
        labels = [f"{side} × {side}, {psnr(before, f):.1f} dB" for side, f in zip(sides, frames, strict=True)]
        save_growth(scales, frames, labels)
    return before, after, {"psnr": psnr(before, after), "bits_per_pixel": bits_per_pixel(tokenizer.config)}


def _check_together(count: int, out: str | None, grid: Path | None, scales: Path | None, as_json: bool) -> None:
    from varcli.outputs.open import check_file

    if out == "-" and as_json:
        raise UsageError("json: with --out -; stdout can carry the images or the lines, not both")
    if out and out.lower().endswith((".npz", ".tar")):
        raise UsageError(f"out: {out}; a .png file, a folder, or - for standard output")
    if grid:
        check_file("grid", grid, (".png",))
    if scales:
        check_file("scales", scales, (".png", ".gif"))
        if count != 1:
            raise UsageError(f"scales: {count} images; exactly one")


def _sheet(grid: Path, pairs: list[tuple["Pixels", "Pixels"]], rows: list[dict[str, Any]]) -> None:
    """Write a contact sheet of each image beside its reconstruction."""
    from varcli.files import write_atomically
    from varcli.images.contact_sheet import contact_sheet
    from varcli.images.provenance import png_bytes

    labels = [label for row in rows for label in (stem(row["image"]), f"{row['psnr']:.2f} dB")]
    write_atomically(grid, png_bytes(contact_sheet([pixels for pair in pairs for pixels in pair], labels)))


def _report(rows: list[dict[str, Any]], *, as_json: bool, aside: bool) -> None:
    """Tell the figures; on stderr where stdout carries images."""
    if as_json:
        for row in rows:
            finite = {name: None if value == math.inf else value for name, value in row.items()}
            result(json.dumps(finite, sort_keys=True))
        return
    lines = [(row["image"], f"{row['psnr']:.2f} dB", f"{row['bits_per_pixel']:.4f} bits/pixel") for row in rows]
    if aside:
        for line in lines:
            note(", ".join(line))
    else:
        table(("image", "PSNR", "tokens"), lines)
