"""`var tokens`: between images and token files."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from varcli.commands import editing_options, options
from varcli.commands.tokenizing import fitted, load, stem
from varcli.console import progress, result
from varcli.errors import UsageError

tokens_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Images to token files and back, for scripts that work on tokens.",
)

TokensOut = Annotated[
    str, typer.Option("--out", "-o", metavar="FILE", help="The .safetensors file to write, or - for standard output.")
]
TokensIn = Annotated[str, typer.Argument(metavar="FILE", help="A token file, or - for standard input.")]


@tokens_app.command()
def encode(
    images: editing_options.Images,
    out: TokensOut,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Write the token maps of images: tokens.0, tokens.1 …, int32 of images × side × side, coarse to fine.

    An image's largest square in the middle is taken, in the tokenizer's size.
    """
    from varcli.checkpoints.token_files import save_tokens
    from varcli.files import check_writable
    from varcli.images.editable import read_source_image
    from varcli.sampling import reconstruction

    if out == "-" and sys.stdout.isatty():
        raise UsageError("out: - is a terminal; send tokens to a file or a pipe")
    if out != "-":
        check_writable(Path(out))
    given = [read_source_image(image) for image in images]
    loaded = load(checkpoint, device, quiet)
    config, found = loaded.tokenizer.config, []
    with progress("images", len(images), quiet) as advance:
        for photograph in given:
            found.append(reconstruction.encode(loaded.tokenizer, fitted(photograph, config.pixels)))
            advance()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.safetensors" if out == "-" else Path(out)
        save_tokens(path, found, [stem(image) for image in images], config, loaded.tokenizer_sha256)
        if out == "-":
            sys.stdout.buffer.write(path.read_bytes())
        elif not quiet:
            result(out)


@tokens_app.command()
def decode(
    file: TokensIn,
    out: editing_options.Out = None,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Make images of a token file. Its last scales may be missing, and its metadata too."""
    from varcli.checkpoints.safetensors_io import file_sha256
    from varcli.checkpoints.token_files import load_tokens
    from varcli.outputs.open import open_sink
    from varcli.sampling.reconstruction import rebuilt

    loaded = load(checkpoint, device, quiet)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(file)
        if file == "-":
            path = Path(folder) / "standard input"
            path.write_bytes(sys.stdin.buffer.read())
        found = load_tokens(path, loaded.tokenizer.config, loaded.tokenizer_sha256)
        inputs = (file_sha256(path),)
        maps = [idx_Bl.clone().to(loaded.device) for idx_Bl in found.maps]
    with open_sink(out, several=len(found.names) > 1) as output:
        for number, name in enumerate(found.names):
            pixels = rebuilt(loaded.tokenizer, [idx_Bl[number : number + 1] for idx_Bl in maps])
            made = output.add(pixels, loaded.made(("tokens", "decode", file), name, number, inputs))
            if made and not quiet:
                result(str(made))
