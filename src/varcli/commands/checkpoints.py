"""`var checkpoints`: what models there are, and getting, converting and checking them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from varcli.checkpoints import registry as known
from varcli.commands import options
from varcli.console import note, result, table
from varcli.errors import CheckpointError

checkpoints_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="List, download, convert and verify models.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A name of `var checkpoints list`.")]
NameOrFile = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A name of `var checkpoints list`, or a file.")]
Released = Annotated[
    list[Path],
    typer.Argument(
        metavar="VAE.pth VAR.pth", help="Tokenizer and transformer, one training checkpoint, or a tokenizer alone."
    ),
]
Converted = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The .safetensors file to write.")]
Sides = Annotated[
    str | None,
    typer.Option(
        metavar="1,2,3,…",
        help="Sides of the token maps.",
        show_default="what the file says, or the published grid of this many tokens",
    ),
]
ClassNames = Annotated[
    Path | None,
    typer.Option(
        "--class-names",
        metavar="FILE|FOLDER",
        help="Names of the classes: a text file, one per line in the order of the rows, or the folder of class folders "
        "that the model was trained on.",
    ),
]
Markdown = Annotated[bool, typer.Option("--markdown", hidden=True, help="The table of the README.")]


@checkpoints_app.command("list")
def list_all(as_json: options.Json = False, markdown: Markdown = False) -> None:
    """List checkpoints by name, with published figures and whether they are on this machine."""
    entries = known.registry().values()
    if markdown:
        for line in known.markdown_table().splitlines():
            result(line)
    elif as_json:
        for entry in entries:
            result(json.dumps(registered_facts(entry)))
    else:
        columns = ("name", "pixels", "classes", "parameters", "FID", "IS", "licence", "size", "here")
        table(columns, [row(entry) for entry in entries])


@checkpoints_app.command()
def show(checkpoint: NameOrFile, as_json: options.Json = False) -> None:
    """Show a checkpoint's figures and source, configuration, class count, hashes, training run."""
    entry = known.registry().get(checkpoint)
    facts = registered_facts(entry) if entry else {}
    if not entry or entry.path.exists():
        from varcli.checkpoints.store import describe

        with known.replaceable(checkpoint):
            facts |= describe(known.local_checkpoint(checkpoint))
    if as_json:
        result(json.dumps(facts))
        return
    for line in in_lines(facts):
        result(line)


@checkpoints_app.command()
def download(name: Name) -> None:
    """Download a released checkpoint and convert it; print where it is. An interrupted download is resumed."""
    if name not in known.registry():
        raise CheckpointError(f"there is no checkpoint {name}; the names are {', '.join(known.registry())}")
    result(str(known.resolve_checkpoint(name)))


@checkpoints_app.command()
def convert(files: Released, out: Converted, sides: Sides = None, class_names: ClassNames = None) -> None:
    """Convert .pth files to one file for `--checkpoint` or `--tokenizer`; no code in them is run."""
    from varcli.checkpoints import conversion

    numbers = None if sides is None else options.parse_numbers("--sides", sides)
    conversion.convert(files, out, numbers, class_names=class_names, note=note)
    result(str(out))


@checkpoints_app.command()
def merge(
    reference: NameOrFile,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="A model that was fine-tuned from it.")],
    out: Converted,
    weight: Annotated[
        float,
        typer.Option(
            "--weight",
            "-w",
            help="w: above 0 extrapolates away from TUNED, between -1 and 0 interpolates, -1 is TUNED itself.",
        ),
    ] = 1.0,
) -> None:
    """Extrapolate a model away from one fine-tuned from it: (1 + w) θ_reference - w θ_tuned, e.g. Neon (2510.03597)."""
    from varcli.checkpoints.merging import merge as merge_files

    merge_files(known.resolve_checkpoint(reference), known.resolve_checkpoint(tuned), weight, out)
    result(str(out))


@checkpoints_app.command()
def verify(checkpoint: NameOrFile) -> None:
    """Verify a checkpoint: its hashes, that every value is finite, that the tokenizer belongs to it."""
    from varcli.checkpoints import store

    entry = known.registry().get(checkpoint)
    path = known.local_checkpoint(checkpoint)
    with known.replaceable(checkpoint):
        store.check_registered(checkpoint, path, store.read_metadata(path)[0])
        hashes = store.verify(path, entry.file_sha256 if entry else None)
    result(f"{checkpoint}: ok, sha256 {hashes['sha256']}")


def registered_facts(entry: known.Entry) -> dict[str, Any]:
    """What the registry says of a checkpoint, and whether its file is on this machine."""
    facts = {key: value for key, value in asdict(entry).items() if value not in (None, ())}
    if entry.files:
        facts["files"] = {file.pop("name"): file for file in facts["files"]}
    place = {"here": entry.path.exists(), "path": str(entry.path), "source": entry.source, "bytes": entry.bytes}
    return facts | place


def row(entry: known.Entry) -> Sequence[str]:
    """Return a checkpoint's line in the list."""
    fid = "–" if entry.fid is None else f"{entry.fid:.2f}"
    score = "–" if entry.inception_score is None else f"{entry.inception_score:.1f}"
    size = "–" if entry.bytes is None else f"{entry.bytes / 1e6:.0f} MB"
    here = "yes" if entry.path.exists() else "no"
    parameters = known.count_in_words(entry.parameters)
    return entry.name, str(entry.pixels), str(entry.classes), parameters, fid, score, entry.licence, size, here


def in_lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Return facts as lines of name and value, those inside others indented."""
    lines: list[str] = []
    for name, value in facts.items():
        if value in (None, ""):
            continue
        inside = value if isinstance(value, dict) else {}
        several = value if isinstance(value, list | tuple) else [value]
        plain = ", ".join(f"{each:.6g}" if isinstance(each, float) else str(each) for each in several)
        lines.append(f"{indent}{name + ':':<{22 - len(indent)}}{'' if inside else plain}".rstrip())
        lines += in_lines(inside, indent + "  ")
    return lines
