"""Training runs, read from the folders that `var train` writes: journal, settings and the last sheet of images."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varcli.errors import InputError
from varcli.report.formatting import LARGEST

JOURNAL = "metrics.jsonl"
COUNTS = ("step", "images_seen")
"""Stand in every line of a journal."""
Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """What a training run told of itself."""

    name: str
    lines: tuple[Figures, ...]
    """Of its journal, oldest first."""
    settings: Mapping[str, Any]
    """All that shaped it; empty where its state is no longer there."""
    sheet: bytes | None
    """The last sheet of sample images, a PNG."""

    @property
    def stage(self) -> str:
        """Which of the two models it trains."""
        return "transformer" if any("accuracy" in line for line in self.lines) else "tokenizer"

    def points(self, figure: str) -> list[tuple[float, float]]:
        """Return images seen and value wherever a figure was noted and is a number to draw."""
        return [(line["images_seen"], line[figure]) for line in self.lines if math.isfinite(line.get(figure, math.nan))]


def read_runs(folders: Sequence[Path]) -> list[TrainingRun]:
    """Return the training runs in folders, named by as much of their paths as tells them apart.

    Raises:
        InputError: one holds none, or what it wrote cannot be read.
    """
    paths = [folder.resolve() for folder in folders]
    names: list[str] = []
    for length in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> TrainingRun:
    """Return the training run in a folder.

    Raises:
        InputError: there is none, or what it wrote cannot be read.
    """
    journal = folder / JOURNAL
    if not journal.is_file():
        raise InputError(f"training run: {folder} has no {JOURNAL}; the folder of a `var train` is needed")
    sheets = sorted((folder / "samples").glob("*.png"))
    try:
        lines = tuple(_lines(journal))
        sheet = sheets[-1].read_bytes() if sheets else None
    except OSError as error:
        raise InputError(f"training run: {folder} cannot be read; {error.strerror}") from error
    if not lines:
        raise InputError(f"training run: {folder} has no figures yet; its first line comes after 50 updates")
    return TrainingRun(name, lines, _settings(folder / "state.safetensors"), sheet)


def _lines(journal: Path) -> Iterator[Figures]:
    """Yield a journal's lines; the last one may be half-written, for the run may be under way."""
    written = journal.read_bytes().splitlines()
    for number, line in enumerate(written, 1):
        try:
            figures = json.loads(line)
            well = all(map(_is_number, figures.values())) and all(0 <= figures[key] < LARGEST for key in COUNTS)
        except (ValueError, AttributeError, KeyError, RecursionError):
            well = False
        if well:
            yield figures
        elif number < len(written):
            raise InputError(f"training run: {journal}, line {number}; figures as `var train` writes them are needed")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _settings(state: Path) -> Mapping[str, Any]:
    """Return what a run's state says of its settings, nothing where there is no state."""
    from safetensors import SafetensorError, safe_open

    if not state.exists():
        return {}
    try:
        with safe_open(state, "np") as file:
            return dict(json.loads((file.metadata() or {}).get("identity", "{}")))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise InputError(f"training run: {state} is damaged; remove it to report without the run's settings") from error
