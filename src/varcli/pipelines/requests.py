"""Which images are to be sampled: of which class, from which seed, in order. No torch here."""

from dataclasses import dataclass

from varcli.images.provenance import Provenance


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One image to be sampled: what the sampler is asked for, and what its file will say."""

    label: int
    """Index in the class table; the number of classes stands for "no class"."""
    seed: int
    provenance: Provenance
