"""The figures of a run: metrics.jsonl, one line every so often."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from varcli.files import cannot_write, parse_json, write_atomically

Metrics = dict[str, float]


def by_scale(figures: Mapping[str, Tensor]) -> Metrics:
    """Return figures as numbers; of a vector, which has one for each scale, name_1 and so on."""
    found: Metrics = {}
    for name, value in figures.items():
        if value.ndim:
            found |= {f"{name}_{scale}": number for scale, number in enumerate(value.tolist(), 1)}
        else:
            found[name] = value.item()
    return found


class MetricsLog:
    """metrics.jsonl: means over the steps since the last line, one JSON object per line."""

    def __init__(self, folder: Path, start: int, batch: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.batch = batch
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.steps = 0
        self.since = self.until = time.perf_counter()
        self.last: Metrics = {}
        if self.path.exists():
            self._drop_after(start)

    def _drop_after(self, start: int) -> None:
        """Remove the lines of steps that will be repeated, and a half-written one."""
        kept = []
        for line in self.path.read_bytes().splitlines():
            try:
                figures = parse_json(line)
                if figures["step"] > start:
                    continue
            except (ValueError, TypeError, KeyError):
                continue
            self.last = figures
            kept.append(line + b"\n")
        write_atomically(self.path, b"".join(kept))

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the figures of one step. Some may be of some steps only."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.counts.update(metrics.keys())
        self.steps += 1
        self.until = time.perf_counter()  # before a validation, which is not part of a step

    def write(
        self,
        step: int,
        validation: Metrics,
        observed: Mapping[str, Tensor] | None = None,
        remaining: int = 0,
        memory: int | None = None,
    ) -> None:
        """Write a line for all steps since the last one, and keep it as `last`.

        Args:
            step: the last one.
            validation: figures on held-out images.
            observed: figures of the state after the step.
            remaining: steps that are left.
            memory: the most bytes that were in use so far.
        """
        figures: Metrics = {"step": step, "images_seen": step * self.batch}
        if self.steps:
            figures |= by_scale({name: total / self.counts[name] for name, total in self.sums.items()})
            seconds = (self.until - self.since) / self.steps
            figures |= {"images_per_second": self.batch / seconds, "seconds_left": remaining * seconds}
        figures |= by_scale(observed or {})
        if memory is not None:
            figures["memory_gib"] = memory / 2**30
        figures |= {f"validation_{name}": value for name, value in validation.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(figures) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error, "the same command resumes once it can be") from error
        self.sums, self.steps, self.since, self.last = {}, 0, time.perf_counter(), figures
        self.counts.clear()
