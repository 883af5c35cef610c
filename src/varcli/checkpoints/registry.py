"""The checkpoints known by name, from `checkpoints.toml`, and the paths of their files. No torch here."""

import difflib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from varcli.config import PRESETS, SampleConfig
from varcli.errors import CheckpointError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A `.pth` file on the Hugging Face hub."""

    name: str
    repository: str
    bytes: int | None = None
    """Size; None where it is not known before the first download."""
    sha256: str | None = None
    """Of its bytes; None where it is not known before the first download."""

    @property
    def page(self) -> str:
        """Web page of the repository."""
        return f"https://huggingface.co/{self.repository}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A checkpoint known by name."""

    name: str
    pixels: int
    """Side of its images."""
    classes: int
    licence: str
    presets: Mapping[str, SampleConfig]
    """Sampling settings, by what they are for."""
    parameters: int | None = None
    """Of the transformer."""
    depth: int | None = None
    """Of the transformer, for one that must be downloaded: its shape follows from it."""
    fid: float | None = None
    """Published Fréchet inception distance of 50 000 samples."""
    fid_band: tuple[float, float] | None = None
    """Lowest and highest that others measured with the released weights."""
    inception_score: float | None = None
    """Published inception score of the same samples."""
    precision: float | None = None
    """Published, of the same samples."""
    recall: float | None = None
    """Published, of the same samples."""
    reference: str | None = None
    """Name of the reference for its samples."""
    bundled: str | None = None
    """File inside the package, for one that ships with it."""
    files: tuple[SourceFile, ...] = ()
    """What to download, for one that does not: tokenizer and transformer."""
    file_sha256: str | None = None
    """Of the bundled file's bytes; elsewhere `sha256` is over weights, configurations and classes."""

    @property
    def path(self) -> Path:
        """Path of its safetensors file, which may not exist yet."""
        if self.bundled:
            return Path(__file__).with_name(self.bundled)
        return cache_folder() / f"{self.name}.safetensors"

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        return self.files[-1].page if self.files else "in the package"

    @property
    def commercial(self) -> bool:
        """Whether its licence allows commercial use."""
        return "-NC" not in self.licence

    @property
    def bytes(self) -> int | None:
        """Size to download or, once it is there, on disk; None where not known."""
        if self.path.exists():
            return self.path.stat().st_size
        sizes = [file.bytes for file in self.files]
        return None if not sizes or None in sizes else sum(size for size in sizes if size)


def cache_folder() -> Path:
    """Folder of converted checkpoints, in the system's folder for caches."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("varcli", appauthor=False))


@lru_cache(maxsize=1)
def registry() -> Mapping[str, Entry]:
    """Return all checkpoints known by name, in the order of `checkpoints.toml`."""
    tables = listed()
    files = {name: SourceFile(name=name, **facts) for name, facts in tables["files"].items()}
    return {name: _entry(name, facts, files) for name, facts in tables["checkpoints"].items()}


def listed() -> dict[str, Any]:
    """What `checkpoints.toml` says."""
    packaged = Path(__file__).with_name("checkpoints.toml")
    checkout = Path(__file__).parents[3] / packaged.name
    return tomllib.loads((packaged if packaged.exists() else checkout).read_text(encoding="utf-8"))


def _entry(name: str, facts: dict[str, Any], files: Mapping[str, SourceFile]) -> Entry:
    if "fid_band" in facts:
        low, high = facts.pop("fid_band")
        facts["fid_band"] = low, high
    presets = {use: SampleConfig(**settings) for use, settings in facts.pop("presets").items()}
    sources = tuple(files[file] for file in facts.pop("files", ()))
    return Entry(name=name, presets=presets, files=sources, **facts)


def presets(checkpoint: str) -> Mapping[str, SampleConfig]:
    """Return the sampling presets of a checkpoint: its own for a registered name, the paper's for a file."""
    return registry()[checkpoint].presets if checkpoint in registry() else PRESETS


def resolve_checkpoint(checkpoint: str, progress: bool = True) -> Path:
    """Return the file of a checkpoint given by name or path, downloading a released one at its first use.

    Args:
        checkpoint: a registered name, or the path of a file.
        progress: show a bar on stderr, if that is a terminal, while downloading.

    Raises:
        CheckpointError: there is no such name or file, or it cannot be downloaded.
        RunError: what was downloaded cannot be stored.
    """
    entry = registry().get(checkpoint)
    if entry and not entry.bundled and not entry.path.exists():
        from varcli.checkpoints.hub import download

        return download(entry, progress)
    return local_checkpoint(checkpoint)


def local_checkpoint(checkpoint: str) -> Path:
    """Return the file of a checkpoint given by name or path, if it is on this machine.

    Raises:
        CheckpointError: there is no such name or file, or it was not downloaded yet.
    """
    entry = registry().get(checkpoint)
    path = entry.path if entry else Path(checkpoint).expanduser()
    if path.is_file():
        if path.suffix.lower() in PICKLED:
            raise CheckpointError(f"{checkpoint} must be converted first: var checkpoints convert VAE [VAR] --out FILE")
        return path
    if path.is_dir():
        models = [path / name for name in ("model.safetensors", "tokenizer.safetensors") if (path / name).is_file()]
        there = f"its {models[0].stem} is {models[0]}" if models else "give the file of a model"
        raise CheckpointError(f"the checkpoint {checkpoint} is a folder; {there}")
    if entry and entry.bundled:
        raise CheckpointError(f"{checkpoint} is missing from this installation: install varcli again")
    if entry:
        raise CheckpointError(f"{checkpoint} is not on this machine yet: var checkpoints download {checkpoint}")
    if path.name != checkpoint or path.suffix == ".safetensors":
        raise CheckpointError(
            f"the checkpoint {checkpoint} does not exist: give a file, or a name of `var checkpoints list`"
        )
    close = difflib.get_close_matches(checkpoint, registry(), n=2) or list(registry())
    raise CheckpointError(
        f"there is no checkpoint {checkpoint}: neither a file nor one of the names {', '.join(close)}; "
        "`var checkpoints list` shows all"
    )


@contextmanager
def replaceable(checkpoint: str) -> Iterator[None]:
    """Add to an error about a downloaded checkpoint how to download it again."""
    try:
        yield
    except CheckpointError as error:
        entry = registry().get(checkpoint)
        if entry is None or entry.bundled or not entry.path.exists():
            raise
        raise CheckpointError(f"{error}; delete {entry.path} to download {checkpoint} again") from error


PICKLED = (".pth", ".pt", ".ckpt")
"""Endings of the files that `var checkpoints convert` reads."""


def markdown_table() -> str:
    """Return the README's table of checkpoints."""
    rows = [["name", "pixels", "classes", "parameters", "FID", "IS", "licence", "weights"], ["---"] * 8]
    for entry in registry().values():
        weights = f"[{entry.files[-1].repository}]({entry.source})" if entry.files else entry.source
        figures = [
            "–" if entry.fid is None else f"{entry.fid:.2f}",
            "–" if entry.inception_score is None else f"{entry.inception_score:.1f}",
        ]
        size = f"{entry.pixels} × {entry.pixels}"
        rows.append(
            [
                f"`{entry.name}`",
                size,
                str(entry.classes),
                count_in_words(entry.parameters),
                *figures,
                entry.licence,
                weights,
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def count_in_words(count: int | None) -> str:
    """Return a number of parameters to three digits, as in 6.12 M, 310 M or 2.01 B."""
    if count is None:
        return "–"
    value, unit = (count / 1e9, "B") if count >= 1e9 else (count / 1e6, "M")
    return f"{value:#.3g}".removesuffix(".") + f" {unit}"
