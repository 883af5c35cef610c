"""The results of `gpu.py` so far, written to disk after every part, so that neither an error nor a kill loses them."""

import json
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from varcli.files import replacing

START = time.perf_counter()
"""Set before torch is imported, which may take long: `gpu.py` imports this module before any that needs torch."""

Row = dict[str, object]
UNDER_WAY = "under way"


def elapsed() -> float:
    """Return how many seconds this process has run."""
    return round(time.perf_counter() - START, 1)


class Log:
    """Figures, the outcome of each part of the run, and notes."""

    def __init__(self, path: Path | None, limit: float = float("inf")) -> None:
        """Take the file to write, if any, and the seconds of this process after which no part is begun."""
        self.path, self.limit = path, limit
        self.speed: list[Row] = []
        self.found: Row = {"speed": self.speed}
        self.parts: dict[str, Row] = {}
        self.notes: list[str] = []

    def begin(self, part: str) -> bool:
        """Return whether there is time for a part; the file names it from now on, in case the run is killed in it."""
        in_time = elapsed() < self.limit
        outcome = UNDER_WAY if in_time else f"left out: the limit of {self.limit:g} s was reached"
        self.parts[part] = {"begun": elapsed(), "outcome": outcome}
        if not in_time:
            _say(f"{part}: {outcome}")
        self.write()
        return in_time

    def end(self, part: str) -> None:
        """Record that a part has ended, and write the file."""
        row = self.parts[part]
        row["ended"] = elapsed()
        if row["outcome"] == UNDER_WAY:
            row["outcome"] = "done"
            _say(f"{part}: done, {row['begun']} to {row['ended']} s")
        self.write()

    def failed(self, part: str, error: Exception) -> None:
        """Record the error that ended a part, or one way to sample images, in a line, and where it came from."""
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "/torch/" not in frame.filename]
        outcome = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.parts.setdefault(part, {"begun": elapsed()}).update(outcome=outcome, where=" > ".join(ours))
        _say(f"{part}: {outcome} ({' > '.join(ours[-3:])})")

    def note(self, line: str) -> None:
        """Record a sampler's note, such as that CUDA graphs cannot be captured."""
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
