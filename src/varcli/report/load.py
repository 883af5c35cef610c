"""Results of `var eval` and training runs, read from files, folders and standard input."""

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from varcli.config import SampleConfig
from varcli.errors import InputError
from varcli.evaluation.results import LARGEST, Result
from varcli.files import parse_json, read_in_pieces
from varcli.report import formatting

MAX_BYTES = 1 << 28
"""Larger files are no results."""
METRICS_LOG = "metrics.jsonl"
STATES = ("state.safetensors", "state-previous.safetensors")
"""States of a training run, the newest first."""
COUNTS = ("step", "images_seen")
"""In every line of a metrics log."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A result of `var eval` in a report."""

    result: Result
    label: str
    """Its name, and what tells it from others of that name."""
    number: int
    """Its position in the report."""

    @property
    def name(self) -> str:
        """What was measured."""
        return measured_name(self.result)

    @property
    def comparison_key(self) -> tuple[str, ...]:
        """What two results must have in common for their distances to be comparable: reference, extractor, size."""
        reference = self.result.reference.sha256 if self.result.reference else ""
        return (
            reference,
            self.result.extractor.sha256,
            *(str(self.result.protocol.get(k)) for k in ("pixels", "resize")),
        )

    def figure(self, name: str) -> float | None:
        """A figure that is one number, None where it was not measured."""
        value = self.result.metrics.get(name)
        return value if isinstance(value, int | float) else None


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Log, settings and samples of a training run."""

    name: str
    lines: tuple[Mapping[str, float], ...]
    """Of its metrics log, oldest first."""
    settings: Mapping[str, Any]
    """All that it depends on; empty where its state is gone."""
    sheet: bytes | None
    """The last sheet of sample images, a PNG."""

    @property
    def stage(self) -> str:
        """Which of the two models it trains."""
        return "transformer" if any("accuracy" in line for line in self.lines) else "tokenizer"

    def points(self, figure: str) -> list[tuple[float, float]]:
        """Images seen and value, wherever a figure was logged and is finite."""
        return [(line["images_seen"], line[figure]) for line in self.lines if math.isfinite(line.get(figure, math.nan))]


def read(sources: Sequence[str]) -> tuple[list[Evaluation], list[TrainingRun]]:
    """Read evaluations and training runs from files, folders and, for "-", standard input, each in their order.

    Raises:
        InputError: one cannot be read, or holds something else.
    """
    results: list[Result] = []
    folders: list[Path] = []
    for source in sources:
        if source == "-":
            results += parse(read_in_pieces(sys.stdin.buffer, MAX_BYTES + 1), "standard input")
        elif Path(source).is_dir():
            folders.append(Path(source))
        else:
            results += parse(_read_bytes(Path(source)), source)
    return label_results(results), read_runs(folders)


# --- evaluations ------------------------------------------------------------------------------------


def _read_bytes(path: Path) -> bytes:
    """Read a file that may be JSON; of another, such as a checkpoint, only the beginning."""
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
            return beginning if b"\0\0" in beginning else beginning + read_in_pieces(file, MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the evaluation result {path} cannot be read: {reason}") from error


def parse(content: bytes, origin: str) -> list[Result]:
    """Parse one JSON object, or several one after the other.

    Raises:
        InputError: there is none, or something else; `origin` names it.
    """
    if len(content) > MAX_BYTES:
        raise InputError(f"the evaluation result {origin} must be at most {MAX_BYTES >> 20} MiB")
    results = [Result.from_json(value, f"{origin}, line {line}") for line, value in _json_values(content, origin)]
    if not results:
        raise InputError(f"the evaluation result {origin} is empty")
    return results


def _json_values(content: bytes, origin: str) -> Iterator[tuple[int, Any]]:
    """Yield each JSON value with the line it begins in."""
    decoder, position = json.JSONDecoder(), 0
    try:
        text = content.decode(json.detect_encoding(content)).rstrip()
        while position < len(text):
            position = re.compile(r"\s*").match(text, position).end()  # type: ignore[union-attr]
            line = text.count("\n", 0, position) + 1
            value, position = decoder.raw_decode(text, position)
            yield line, value
    except (ValueError, RecursionError) as error:
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"the evaluation result {origin} is not JSON{place}") from error


def measured_name(result: Result) -> str:
    """What was measured: a checkpoint by name, or images by the end of their path."""
    if result.checkpoint:
        return formatting.shortened_path(str(result.checkpoint["name"]))
    paths = result.source["paths"] if result.source else ()
    assert isinstance(paths, Sequence)
    return " + ".join(formatting.shortened_path(str(path)) for path in paths) or "images"


def label_results(results: Sequence[Result]) -> list[Evaluation]:
    """Label results by what distinguishes them; where nothing does, number them."""
    names = [measured_name(result) for result in results]
    labels = [[name] for name in names]
    details = [_details(result) for result in results]
    kinds = [(name, result.what) for name, result in zip(names, results, strict=True)]
    for number, texts in enumerate(zip(*details, strict=True)):
        alike: Sequence[Any] = kinds if number else names  # settings of samples tell nothing of a tokenizer
        for i, text in enumerate(texts):
            if text and any(alike[j] == alike[i] and texts[j] != text for j in range(len(results))):
                labels[i].append(text)
        if len(set(map(tuple, labels))) == len(labels):
            break
    joined = [", ".join(parts) for parts in labels]
    repeated = [joined[:number].count(label) for number, label in enumerate(joined)]
    return [
        Evaluation(result, f"{label} ({before + 1})" if before else label, number)
        for number, (result, label, before) in enumerate(zip(results, joined, repeated, strict=True))
    ]


def _details(result: Result) -> list[str]:
    """What may distinguish a result from others of its name, the most useful first; empty where unknown."""
    checkpoint = result.checkpoint or {}
    return [
        result.what,
        *(_detail(option.name, checkpoint.get(option.name)) for option in fields(SampleConfig)),
        str(checkpoint.get("dtype", "")),
        *(_detail(name, result.protocol.get(name)) for name in SELECTION),
        f"n {formatting.grouped(result.n)}",
        f"against {result.reference.name}" if result.reference else "",
        _detail("seed", checkpoint.get("seed")),
        str(checkpoint.get("sha256", ""))[:8],
        result.date,
    ]


SELECTION = ("rejected", "best_of", "decide_at", "classifier")
"""Parts of a protocol that say which images were selected."""


def _detail(name: str, value: Any) -> str:
    return "" if value in (None, "") else f"{name.replace('_', '-')} {formatting.setting(name, value)}"


# --- training runs ----------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path]) -> list[TrainingRun]:
    """Read training runs, named by as much of their paths as tells them apart.

    Raises:
        InputError: a folder holds none, or a file of it cannot be read.
    """
    paths = [folder.resolve() for folder in folders]
    names: list[str] = []
    for length in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> TrainingRun:
    if not folder.exists():
        raise InputError(f"there is no training run {folder}: give its folder")
    log = folder / METRICS_LOG
    if not log.is_file():
        raise InputError(
            f"the training run {folder} has no {METRICS_LOG}: give the folder of a run that has logged figures"
        )
    sheets = sorted(path for path in (folder / "samples").glob("*.png") if path.is_file())  # a pipe would not end
    try:
        lines = tuple(_log_lines(log))
        sheet = sheets[-1].read_bytes() if sheets else None
    except OSError as error:
        raise InputError(f"the training run {folder} cannot be read: {error.strerror}") from error
    if not lines:
        raise InputError(f"the training run {folder} has no figures yet: the first are logged after 50 steps")
    return TrainingRun(name, lines, _run_settings(folder), sheet)


def _log_lines(log: Path) -> Iterator[Mapping[str, float]]:
    """Yield the lines of a metrics log; the last may be half-written, as the run may be under way."""
    written = log.read_bytes().splitlines()
    for number, line in enumerate(written, 1):
        try:
            figures = parse_json(line)
            valid = all(map(_is_number, figures.values())) and all(0 <= figures[key] < LARGEST for key in COUNTS)
        except (ValueError, AttributeError, KeyError):
            valid = False
        if valid:
            yield figures
        elif number < len(written):
            raise InputError(
                f"the log {log} of a training run must have figures in line {number}, as `var train` writes them"
            )


LARGEST_LOGGED = 1e300
"""No figure of a run is as large; an integer of JSON may be, and is more than arithmetic takes."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > LARGEST_LOGGED


def _run_settings(folder: Path) -> Mapping[str, Any]:
    """Read a run's settings from the newest of its states that is not damaged, nothing where there is no state."""
    from safetensors import SafetensorError, safe_open

    states = [file for file in (folder / name for name in STATES) if file.is_file()]
    for state in states:
        try:
            with safe_open(state, "np") as file:
                return dict(parse_json((file.metadata() or {}).get("identity", "{}")))
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            damaged = error
    if states:
        raise InputError(f"{state} is damaged: remove it to report without the run's settings") from damaged
    return {}
