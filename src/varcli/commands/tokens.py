"""`var reconstruct` and `var tokens`: the tokenizer alone, to images and to token files."""

import json
import math
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from varcli.commands import options
from varcli.config import TransformerTrainingConfig
from varcli.console import note, notes, progress, result, table
from varcli.errors import InputError, UsageError

Images = Annotated[
    list[str], typer.Argument(metavar="IMG...", help="Images of any size and kind; - is standard input.")
]


def reconstruct(
    *,
    images: Images,
    out: Annotated[
        str | None,
        Option(
            "--out",
            "-o",
            metavar="PATH",
            help="Also write the reconstructions: a .png file, a folder, or - for stdout (several: a tar stream).",
        ),
    ] = None,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    grid: Annotated[
        Path | None,
        Option("--grid", metavar="FILE", help="Also write a sheet of images beside their reconstructions, .png."),
    ] = None,
    growth: options.Growth = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Encode and decode images with the tokenizer; print PSNR and bits per pixel of each.

    An image is centre-cropped to a square and resized to the tokenizer's size, as in training.
    """
    from varcli.outputs.open import check_outputs, open_sink

    options.check_image_outputs(out, as_json, growth, len(images))
    check_outputs(out, grid, growth, archives=False, inputs=images)
    from varcli.pipelines.model import load
    from varcli.pipelines.tokens import ReadableImages, save_pairs
    from varcli.pipelines.tokens import reconstruct as reconstruct_image

    sources = ReadableImages(images, note)
    model = load(checkpoint, device=device, progress=not quiet)
    pairs, lines = [], []
    opened = nullcontext() if out is None else open_sink(out, several=len(images) > 1, archives=False)
    with opened as sink, progress("images", len(images), quiet) as advance:
        for number, source in sources:
            pair = reconstruct_image(model, source, number, growth=growth)
            path = sink.add(pair.after.array, pair.after.provenance) if sink else None
            psnr = None if pair.psnr == math.inf else pair.psnr
            facts = {
                "image": images[number],
                "path": path and str(path),
                "psnr": psnr,
                "bits_per_pixel": pair.bits_per_pixel,
            }
            pairs.append((images[number], pair))
            lines.append(facts)
            advance()
    if grid and pairs:
        save_pairs(grid, pairs)
    rows = [(image, f"{pair.psnr:.2f} dB", f"{pair.bits_per_pixel:.4f} bits/pixel") for image, pair in pairs]
    if as_json:
        for facts in lines:
            result(json.dumps(facts, sort_keys=True))
    elif out == "-":  # stdout carries the images
        for row in rows:
            note(", ".join(row))
    elif rows:
        table(("image", "PSNR", "tokens"), rows)
    written = Path(out) if out is not None and out != "-" and not as_json else None
    options.tell_also(*((written, grid, growth) if pairs else ()), quiet=quiet)
    sources.check()


tokens_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Encode images to token files and decode them, for scripts that work on tokens.",
)


@tokens_app.command()
@options.expand
def encode(
    *,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMG|DATA...",
            help="Images of any size and kind, - is standard input; or data to train on: folders of class folders, "
            "zips, tar shards or .npz files.",
        ),
    ],
    out: Annotated[
        str,
        Option(
            "--out",
            "-o",
            metavar="PATH",
            help="The .safetensors file to write, or - for standard output; for data a folder.",
        ),
    ],
    checkpoint: Annotated[
        str,
        Option(
            "--checkpoint",
            "-m",
            "--tokenizer",
            metavar="NAME|FILE",
            envvar="VAR_CHECKPOINT",
            help="The model or tokenizer: a name of `var checkpoints list`, or a file.",
        ),
    ] = options.DEFAULT_CHECKPOINT,
    recipe: Annotated[dict[str, Any], TransformerTrainingConfig, "crops", "flip", "enlarge", "seed"],
    holdout: options.Holdout = 0,
    workers: options.Workers = None,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Write the token maps of images: tokens.0, tokens.1 …, int32 of images × side × side, coarse to fine.

    An image is centre-cropped to a square and resized to the tokenizer's size.

    Of data to train on, token maps of several crops go into a folder, for `var train transformer --tokens`.
    """
    from varcli.files import check_not_read, check_writable, kind_there

    if any(Path(image).is_dir() or Path(image).suffix.lower() in (".zip", ".tar", ".npz") for image in images):
        if out == "-" or Path(out).suffix.lower() == ".safetensors" or kind_there(Path(out)) == "file":
            raise UsageError(f"--out must be a folder, for token maps of data to train on (got {out})")
        check_not_read("out", Path(out), images)
        from varcli.pipelines.train import encode_data

        training = TransformerTrainingConfig(**recipe)
        encode_data(
            images,
            checkpoint,
            out,
            training=training,
            holdout=holdout,
            device=device,
            workers=workers,
            note=notes(quiet),
            quiet=quiet,
        )
        if not quiet:
            result(out)
        return
    if recipe or holdout:
        raise UsageError("--crops, --flip, --resize-ratio, --seed and --holdout are for data to train on, not images")
    if out != "-" and Path(out).suffix.lower() != ".safetensors" and kind_there(Path(out)) != "device":
        raise UsageError(f"--out must be a name ending in .safetensors, or - for standard output (got {out})")
    if out == "-" and sys.stdout.isatty():
        raise UsageError("--out - is a terminal; send tokens to a file or a pipe")
    if out != "-":
        check_not_read("out", Path(out), images)
        check_writable(Path(out))
    from varcli.pipelines.model import load
    from varcli.pipelines.tokens import ReadableImages, encode_to

    sources = ReadableImages(images, note)
    model = load(checkpoint, device=device, progress=not quiet)
    with tempfile.TemporaryDirectory() as folder, progress("images", len(images), quiet) as advance:
        path = Path(folder) / "tokens.safetensors" if out == "-" else Path(out)
        count = encode_to(model, (source for _, source in sources), path, advance)
        if not count:
            sources.check()
        if out == "-":
            sys.stdout.buffer.write(path.read_bytes())
        elif not quiet:
            result(out)
    sources.check()


MOST_BYTES = 1 << 30
"""Of a token file on standard input; more may have no end."""


@tokens_app.command()
def decode(
    *,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A token file, or - for standard input.")],
    out: options.ImagesOut = None,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Decode the images of a token file. Its last scales may be missing, and its metadata too."""
    from varcli.files import read_in_pieces
    from varcli.outputs.open import check_outputs, open_sink

    check_outputs(out, archives=False, inputs=[file])
    from varcli.pipelines.model import load
    from varcli.pipelines.tokens import decode_file

    model = load(checkpoint, device=device, progress=not quiet)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(file)
        if file == "-":
            path = Path(folder) / "standard input"
            content = read_in_pieces(sys.stdin.buffer, MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise InputError(
                    f"standard input has more than {MOST_BYTES >> 30} GiB: give a larger token file by name"
                )
            path.write_bytes(content)
        count, images = decode_file(model, path, file)
    with open_sink(out, several=count > 1, archives=False) as sink:
        for image in images:
            written = sink.add(image.array, image.provenance)
            if written and not quiet:
                result(str(written))
