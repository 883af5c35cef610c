"""The loop from images to statistics: in rounds, by one or several processes, and resumable.

The source of images is called with ranks and yields these images in batches of any size. The results of all processes
in a round are gathered in the main one, which keeps the statistics and their file.

Shapes: R images of a round, N features of the network's last pooling, V its classes.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from json import dumps
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from varcli.distributed import ProcessGroup
from varcli.errors import RunError, VarError
from varcli.evaluation.extractors import Extractor, Pixels
from varcli.evaluation.statistics import EvalPlan, FeatureShape, Statistics
from varcli.files import check_writable, replacing

Batch = tuple[Sequence[int], Pixels, Sequence[int]]
"""Indices, pixels (B, H, W, 3), and labels, -1 where no class is known."""

Make = Callable[[Sequence[int]], Iterable[Batch]]
"""Yields the images of given indices, in any order; unreadable ones may be missing."""

ROUNDS = {"cpu": 64}
"""Images that a process measures in a round, by kind of device; a killed run loses two rounds at most."""

LARGE_ROUND = 512
"""The same elsewhere, where batches are large and fast."""

SAVE_SECONDS, SAVE_IMAGES = 60, 4000
"""The file is written after this time or this number of images."""


def fingerprint(**facts: Any) -> str:
    """Return the sha256 of all facts, as JSON, that determine a measurement's figures."""
    return sha256(dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class FeaturePass:
    """Statistics of a plan's images, in memory and in a file."""

    def __init__(
        self,
        plan: EvalPlan,
        shape: FeatureShape,
        identity: str,
        path: Path | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """Start, or resume from the file of an earlier run.

        Args:
            plan: what to measure.
            shape: how many features the extractor has.
            identity: a fingerprint of the images, the extractor and all else that determines the figures. A file
                with another one is not resumed.
            path: file for progress; without it, or where it cannot be written, a killed run starts over.
            group: the processes that share the work.
        """
        self.plan, self.path, self.group = plan, path, group or ProcessGroup()
        self.statistics = Statistics(plan, shape)
        self.seconds = {"images": 0.0, "features": 0.0}
        self.notice = ""
        """Why the file is not resumed, or progress is not saved, if so; for the user."""
        self._facts = {
            "kind": KIND,
            "format": FORMAT,
            "identity": identity,
            "plan": dumps({name: value for name, value in asdict(plan).items() if value != ()}, sort_keys=True),
        }
        self._unsaved, self._saved_at = 0, time.monotonic()
        if path and self.group.is_main:
            self._resume(path)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                check_writable(path)
            except (OSError, RunError) as error:
                self.path = None
                self.notice = f"measuring without saving progress: {error}"

    def run(
        self,
        make: Make,
        extractor: Extractor,
        advance: Callable[[int], None] = lambda count: None,
        unit: int = 1,
    ) -> None:
        """Measure the images that are missing.

        To be called by all processes. Progress is saved however this ends.

        Args:
            make: yields images.
            extractor: computes their features.
            advance: called with how many each round added.
            unit: how many consecutive images are best processed together.

        Raises:
            VarError: images are not available, features are not finite, or the file cannot be written.
        """
        missing: list[int] = self.group.broadcast((~self.statistics.present).nonzero().flatten().tolist())
        size = self.group.world_size * ceil(ROUNDS.get(extractor.device.type, LARGE_ROUND) / unit) * unit
        try:
            for start in range(0, len(missing), size):
                indices = missing[start : start + size]
                share = ceil(len(indices) / self.group.world_size / unit) * unit
                mine = indices[self.group.rank * share : (self.group.rank + 1) * share]
                self._add(indices, self.group.sum(self._measure(indices, mine, make, extractor)), advance)
        except BaseException:
            with suppress(VarError):  # the error that ended the run should be reported
                self.save()
            raise
        self.save()

    def _measure(
        self, indices: Sequence[int], mine: Sequence[int], make: Make, extractor: Extractor
    ) -> dict[str, Tensor]:
        """Return the features of this process's share of a round, with zeros where another process's stand."""
        shape = self.statistics.shape
        position = {index: i for i, index in enumerate(indices)}
        batches = []
        clock = time.perf_counter()
        for batch_indices, pixels_BHW3, labels in make(mine):
            clock = self._took("images", clock)
            batches.append(([position[index] for index in batch_indices], labels, extractor.features(pixels_BHW3)))
            clock = self._took("features", clock)
        clock = self._took("images", clock)
        share = {
            "pool_RN": torch.zeros(len(indices), shape.pool),
            "logits_RV": torch.zeros(len(indices), shape.classes),
            "spatial_RF": torch.zeros(len(indices), shape.spatial if "spatial" in self.plan.needs else 0),
            "label_R": torch.zeros(len(indices), dtype=torch.int64),
            "there_R": torch.zeros(len(indices), dtype=torch.int64),
        }
        for at, labels, features in batches:  # only now, so that a GPU need not be waited for after each batch
            share["pool_RN"][at] = features.pool_BN.cpu()
            if features.logits_BV is not None:
                share["logits_RV"][at] = features.logits_BV.cpu()
            if features.spatial_BF is not None and "spatial" in self.plan.needs:
                share["spatial_RF"][at] = features.spatial_BF.cpu()
            share["label_R"][at] = torch.as_tensor(labels)
            share["there_R"][at] = 1
        self._took("features", clock)
        return share

    def _took(self, what: str, since: float) -> float:
        """Count the time since then; return the time it is."""
        now = time.perf_counter()
        self.seconds[what] += now - since
        return now

    def _add(self, indices: Sequence[int], round_: Mapping[str, Tensor], advance: Callable[[int], None]) -> None:
        if not self.group.is_main:
            return
        there_R = round_["there_R"].bool()
        pool_RN, logits_RV, spatial_RF, label_R = (
            round_[name][there_R] for name in ("pool_RN", "logits_RV", "spatial_RF", "label_R")
        )
        unsaved, self._unsaved = self._unsaved + len(label_R), 0  # half-added sums must not be saved
        self.statistics.add(torch.tensor(indices)[there_R].tolist(), label_R.tolist(), pool_RN, logits_RV, spatial_RF)
        self._unsaved = unsaved
        advance(len(label_R))
        if unsaved >= SAVE_IMAGES or time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save()

    # --- the file ----------------------------------------------------------------------------------

    def save(self) -> None:
        """Save progress, if there is any since the last save.

        Raises:
            RunError: it cannot be written.
        """
        if not (self.path and self.group.is_main and self._unsaved):
            return
        try:
            with replacing(self.path) as temporary:
                save_file(self.statistics.tensors(), temporary, self._facts)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
        self._unsaved, self._saved_at = 0, time.monotonic()

    def _resume(self, path: Path) -> None:
        """Load the file, if it belongs to this measurement."""
        if not path.exists():
            return
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata()
            tensors = load_file(path)
        except (OSError, SafetensorError):
            self.notice = f"{path} is damaged: measuring from the start"
            return
        if facts != self._facts or not self.statistics.fits(tensors):
            self.notice = f"{path} is of another measurement: measuring from the start"
            return
        self.statistics.load(tensors)


KIND, FORMAT = "varcli-measurement", "1"
"""What marks such files, and their version."""
