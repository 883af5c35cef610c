"""What measuring takes, from `checkpoints.toml`: references, and the weights features come from. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from varcli.checkpoints.registry import cache_folder, listed
from varcli.errors import CheckpointError, InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """A file that measuring takes: a reference, or the weights of the network that sees for us."""

    name: str
    note: str = ""
    """What it is, in words."""
    pixels: int | None = None
    """Side of its pictures, for a reference."""
    bundled: str | None = None
    """File inside the package, for one that ships with it."""
    address: str | None = None
    """Where to download it, for one that does not."""
    bytes: int | None = None
    """Size; None where it is not known before the first download."""
    sha256: str | None = None
    """Of its bytes; None where it is not known before the first download."""

    @property
    def path(self) -> Path:
        """Where it lies once it is there."""
        if self.bundled:
            return Path(__file__).parents[1] / "evaluation" / self.bundled
        return cache_folder() / str(self.address).rpartition("/")[2]


@lru_cache(maxsize=1)
def references() -> Mapping[str, Material]:
    """Return all references known by name, in the order of `checkpoints.toml`."""
    return {name: Material(name=name, **facts) for name, facts in listed()["references"].items()}


def inception_weights() -> Material:
    """Return what is known of the weights that features are computed with."""
    return Material(name="inception", **listed()["weights"]["inception"])


def find_reference(reference: str, progress: bool = True) -> Path:
    """Return the path of a reference given by name or path, downloading a known one at its first use.

    Raises:
        InputError: there is no such name or path.
        CheckpointError: it cannot be downloaded.
        RunError: what was downloaded cannot be stored.
    """
    if reference in references():
        return _fetched(references()[reference], "--reference FILE", progress)
    if not Path(reference).exists():
        raise InputError(f"reference: {reference}; no such file, and the names are {', '.join(references())}")
    return Path(reference)


def find_inception(given: Path | None = None, progress: bool = True) -> Path:
    """Return the file of the weights that features are computed with: the one given, else the known one.

    Raises:
        CheckpointError: the given one is not there, or the known one cannot be downloaded.
        RunError: what was downloaded cannot be stored.
    """
    if given is None:
        return _fetched(inception_weights(), "--inception FILE or VAR_INCEPTION=FILE", progress)
    if not given.is_file():
        raise CheckpointError(f"inception weights: {given}; no such file; {inception_weights().address} is the one")
    return given


def _fetched(material: Material, option: str, progress: bool) -> Path:
    if material.bundled and not material.path.exists():
        raise CheckpointError(f"{material.path.name}; missing from this installation, install varcli again")
    if material.address is None:
        return material.path
    from varcli.evaluation.downloads import fetch  # noqa: PLC0415 (the hub's library, only when needed)

    return fetch(
        material.address,
        material.path,
        size=material.bytes,
        sha256=material.sha256,
        advice=f"get it on another machine and give it by {option}, or put it at {material.path}",
        progress=progress,
    )
