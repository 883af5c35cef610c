"""What a report is made of, by what a user names: files, folders, standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path

from varcli.errors import InputError
from varcli.report.evaluations import Evaluation, Facts, named, parse
from varcli.report.runs import TrainingRun, read_runs


def read(sources: Sequence[str]) -> tuple[list[Evaluation], list[TrainingRun]]:
    """Return the evaluations and training runs in files, folders and, for "-", standard input, each in their order.

    Raises:
        InputError: one cannot be read, or holds something else.
    """
    found: list[Facts] = []
    folders: list[Path] = []
    for source in sources:
        if source == "-":
            found += parse(sys.stdin.buffer.read(), "standard input")
        elif Path(source).is_dir():
            folders.append(Path(source))
        else:
            found += parse(_bytes(Path(source)), source)
    return named(found), read_runs(folders)


def _bytes(path: Path) -> bytes:
    """Return a file's bytes if they may be JSON, the beginning otherwise: a checkpoint is not read for nothing."""
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
            return beginning if b"\0\0" in beginning else beginning + file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"evaluation result: {path} cannot be read; {reason}") from error
