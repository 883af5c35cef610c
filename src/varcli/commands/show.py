"""`var show`: how an image was made, and how to make it again."""

import json
from dataclasses import asdict

from varcli.commands import options
from varcli.console import result


def show(file: options.ImageFile, as_json: options.Json = False) -> None:
    """Print how an image was made and the command that makes it again.

    On the same machine the copy is equal bit for bit, unless made in 16 bits on a GPU.
    """
    from varcli.images.provenance import read_provenance, reproduction_command

    made = read_provenance(file)
    if as_json:
        result(json.dumps(asdict(made) | {"command": reproduction_command(made)}, sort_keys=True))
        return
    number = "" if made.class_id is None else f"{made.class_id} "
    facts = {
        "checkpoint": f"{made.checkpoint}, sha256 {made.checkpoint_sha256}",
        "class": f"{number}{made.class_name}",
        "seed": made.seed,
        "settings": f"cfg {made.cfg:g}, top-k {made.top_k}, top-p {made.top_p:g}{', smooth' if made.smooth else ''}",
        "computed": f"on {made.device} in {made.dtype}, by varcli {made.version}",
    }
    if made.batched:
        facts["exact"] = "no: in 16 bits on a GPU the size of a batch changes the rounding, and tokens with it"
    facts["again"] = reproduction_command(made)
    for name, value in facts.items():
        result(f"{name:<11}{value}")
