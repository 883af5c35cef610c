"""`var show`: an image's settings, and the command that reproduces it."""

import json
from pathlib import Path

from varcli.commands import options
from varcli.console import readable, result
from varcli.files import file_sha256


def show(file: options.ImageFile, as_json: options.Json = False) -> None:
    """Show an image's settings and the command that reproduces it.

    On the same machine the copy is bit-identical, unless it was made in 16 bits on a GPU.
    """
    from varcli.images.provenance import input_files, read_provenance, reproduction_command

    provenance = read_provenance(file)
    command = reproduction_command(provenance)
    if as_json:
        result(json.dumps(provenance.to_dict() | {"command": command}, sort_keys=True))
        return
    number = "" if provenance.class_id is None else f"{provenance.class_id} "
    facts = [
        ("checkpoint", f"{provenance.checkpoint}, sha256 {provenance.checkpoint_sha256}"),
        *(
            [("refiner", f"{provenance.settings.refiner}, sha256 {provenance.refiner_sha256}")]
            if provenance.settings.refiner
            else []
        ),
        ("class", f"{number}{provenance.class_name}"),
        ("seed", provenance.seed),
        ("settings", provenance.settings.describe()),
        ("computed", f"on {provenance.device} in {provenance.dtype}, by varcli {provenance.version}"),
        *(
            ("input", f"{name}, sha256 {digest}{_changed(name, digest)}")
            for name, digest in input_files(provenance).items()
        ),
    ]
    if provenance.batched:
        facts.append(("exact", "no: in 16 bits on a GPU the batch size changes the rounding, and with it the tokens"))
    facts.append(("command", command))
    for name, value in facts:
        result(f"{name:<11}{readable(str(value))}")


def _changed(name: str, digest: str) -> str:
    """Whether an input is still the file that the image was made from."""
    if name == "-" or name.startswith("/dev/"):
        return "; it had no name, so the command is incomplete"
    path = Path(name)
    if not path.is_file():
        return "; there is no such file now"
    return "" if file_sha256(path) == digest else "; the file of this name has changed"
