"""`var show`: an image's settings, and the command that reproduces it."""

import json

from varcli.commands import options
from varcli.console import result


def show(file: options.ImageFile, as_json: options.Json = False) -> None:
    """Show an image's settings and the command that reproduces it.

    On the same machine the copy is bit-identical, unless it was made in 16 bits on a GPU.
    """
    from varcli.images.provenance import read_provenance, reproduction_command

    provenance = read_provenance(file)
    command = reproduction_command(provenance)
    if as_json:
        result(json.dumps(provenance.to_dict() | {"command": command}, sort_keys=True))
        return
    number = "" if provenance.class_id is None else f"{provenance.class_id} "
    facts = {
        "checkpoint": f"{provenance.checkpoint}, sha256 {provenance.checkpoint_sha256}",
        "class": f"{number}{provenance.class_name}",
        "seed": provenance.seed,
        "settings": provenance.settings.describe(),
        "computed": f"on {provenance.device} in {provenance.dtype}, by varcli {provenance.version}",
    }
    if provenance.batched:
        facts["exact"] = "no: in 16 bits on a GPU the batch size changes the rounding, and tokens with it"
    facts["command"] = command
    for name, value in facts.items():
        result(f"{name:<11}{value}")
