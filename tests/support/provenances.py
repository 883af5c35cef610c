"""Made-up images with made-up provenance, for the tests of everything that writes them."""

import dataclasses

import numpy as np

from varcli.config import SampleConfig
from varcli.images.provenance import Provenance

MADE = Provenance(
    checkpoint="tiny64",
    checkpoint_sha256="5e" * 32,
    class_id=207,
    class_name="golden retriever",
    seed=0,
    settings=SampleConfig(cfg=1.5, top_k=900, top_p=0.96),
    device="cpu",
    dtype="fp32",
    version="0.1.0",
)


def made(seed=0, **changes):
    """Provenance of the image of this seed; `changes` are of its settings or its own."""
    names = {field.name for field in dataclasses.fields(SampleConfig)} & changes.keys()
    settings = dataclasses.replace(MADE.settings, **{name: changes.pop(name) for name in names})
    return dataclasses.replace(MADE, seed=seed, settings=settings, **changes)


def image(seed=0, height=8, width=8):
    """Pixels that tell one seed from another."""
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def listing(folder):
    """Names of all that lies in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())
