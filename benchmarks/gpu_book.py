"""What `gpu.py` has found so far, on the disk after every part, so that neither an error nor a kill loses it."""

import json
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from varcli.files import replacing

BEGUN = time.perf_counter()
"""Set before torch is imported, which may take long, as `gpu.py` imports this module before any that needs torch."""

Row = dict[str, object]
UNDER_WAY = "under way"


def age() -> float:
    """Return how many seconds this process has run."""
    return round(time.perf_counter() - BEGUN, 1)


class Book:
    """Figures, what became of each part of the run, and notes."""

    def __init__(self, path: Path | None, limit: float = float("inf")) -> None:
        """Take the file to write, if any, and the seconds of this process after which no part is begun."""
        self.path, self.limit = path, limit
        self.speed: list[Row] = []
        self.found: Row = {"speed": self.speed}
        self.parts: dict[str, Row] = {}
        self.notes: list[str] = []

    def begin(self, part: str) -> bool:
        """Return whether there is time for a part; the file tells of it from now on, in case it is the last one."""
        in_time = age() < self.limit
        outcome = UNDER_WAY if in_time else f"left out: the limit of {self.limit:g} s was reached"
        self.parts[part] = {"begun": age(), "outcome": outcome}
        if not in_time:
            _say(f"{part}: {outcome}")
        self.write()
        return in_time

    def end(self, part: str) -> None:
        """Note down that a part is over, well or not, and write the file."""
        row = self.parts[part]
        row["ended"] = age()
        if row["outcome"] == UNDER_WAY:
            row["outcome"] = "done"
            _say(f"{part}: done, {row['begun']} to {row['ended']} s")
        self.write()

    def failed(self, part: str, error: Exception) -> None:
        """Note down, in a line, what went wrong in a part, or in one way to make images, and where."""
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "/torch/" not in frame.filename]
        outcome = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.parts.setdefault(part, {"begun": age()}).update(outcome=outcome, where=" > ".join(ours))
        _say(f"{part}: {outcome} ({' > '.join(ours[-3:])})")

    def told(self, line: str) -> None:
        """Note down what makes a way slower than it might be."""
        self.notes.append(line)
        _say(line)

    def keep(self, figures: Mapping[str, object]) -> None:
        """Add figures by name."""
        self.found.update(figures)

    def write(self) -> None:
        """Write everything as JSON: the file is the old one or the new one, whenever the process is killed."""
        if self.path is None:
            return
        parts = [{"part": part} | row for part, row in self.parts.items()]
        with replacing(self.path) as temporary:
            temporary.write_text(
                json.dumps(self.found | {"parts": parts, "notes": self.notes}, indent=1, default=str) + "\n"
            )


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
