"""What `var eval` and `var eval stats` share: statistics of pictures, and references to hold them against."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from varcli import __version__
from varcli.checkpoints.materials import find_reference, references
from varcli.checkpoints.registry import cache_folder
from varcli.commands.eval_subjects import Given, Subject
from varcli.evaluation.inception import Inception
from varcli.evaluation.measurement import Measurement, fingerprint
from varcli.evaluation.pictures import PictureList, open_pictures
from varcli.evaluation.references import Reference, holds_pictures, read_reference, save_reference
from varcli.evaluation.statistics import Plan, Statistics
from varcli.files import file_sha256
from varcli.processes import Group
from varcli.reporting import note, progress

FEW_TO_KEEP = 10_000
"""Up to so many pictures a reference's features are kept with its statistics, for KID, precision and recall."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What measures: the network, the processes at work, and whether they say what they do."""

    inception: Inception
    group: Group
    quiet: bool

    def measure(
        self, subject: Subject, plan: Plan, label: str, resumable: bool = True
    ) -> tuple[Measurement, Callable[[], None]]:
        """Return the measurement of all pictures, and what to call once its figures are where they belong.

        The latter forgets the file from which a killed run goes on. To be called by all processes; the first one
        has the figures.

        Raises:
            VarError: pictures cannot be had, or the file cannot be written.
        """
        decided = asdict(plan) | subject.identity()
        identity = fingerprint(version=__version__, extractor=self.inception.sha256, **decided)
        path = cache_folder() / "measurements" / f"{identity[:16]}.safetensors" if resumable else None
        measurement = Measurement(plan, identity, path, self.group)
        self._say_where(measurement, plan, label)
        resumed = bool(self.group.broadcast(measurement.statistics.count))
        with subject.ready(resumed), progress(label, plan.count, self.quiet) as advance:
            advance(measurement.statistics.count)
            try:
                measurement.run(subject.shown, self.inception, advance, subject.unit)
            except KeyboardInterrupt:
                if path and not self.quiet:
                    note(f"{measurement.statistics.count} pictures are measured; the same command goes on from there")
                raise
        subject.join(self.group)
        return measurement, lambda: path.unlink(missing_ok=True) if path and self.group.first else None

    def _say_where(self, measurement: Measurement, plan: Plan, label: str) -> None:
        if self.quiet:
            return
        if measurement.notice:
            note(measurement.notice)
        if measurement.statistics.count:
            note(f"{label}: going on after {measurement.statistics.count} of {plan.count}")

    def keep_statistics(self, pictures: PictureList, features: bool, path: Path, label: str) -> None:
        """Measure pictures and write their statistics as a reference, with their features if asked for."""
        plan = Plan(count=len(pictures), metrics=("fid", "kid") if features else ("fid",))
        measurement, forget = self.measure(Given(pictures, []), plan, label)
        if self.group.first:
            self.keep(path, measurement.statistics, pictures.side)
        forget()
        self.group.barrier()

    def pictures(self, paths: Sequence[str | Path], resize: int | None, skip_bad: bool) -> PictureList:
        """Return pictures that exist; what stdin lists is read by the first process, for all of them."""
        listed = "-" in map(str, paths)
        lines = self.group.broadcast(list(sys.stdin) if listed and self.group.first else [])
        return open_pictures(paths, resize=resize, skip_bad=skip_bad, lines=lines)

    # --- references --------------------------------------------------------------------------------

    def reference(self, name: str, features: bool, resize: int | None) -> Reference | None:
        """Return what to measure against, its features too if asked for; what takes long is kept for next time.

        To be called by all processes; the first one has it.

        Args:
            name: a reference known by name, a file of statistics, or a place of pictures.
            features: whether KID, precision or recall ask for the pictures' features.
            resize: side to which pictures of a place are cropped and resized.

        Raises:
            VarError: there is no such reference, or it cannot be used.
        """
        path = self.group.broadcast(find_reference(name, progress=not self.quiet) if self.group.first else None)
        assert path is not None
        if self.group.broadcast(holds_pictures(path) if self.group.first else False):
            pictures = open_pictures([path], resize=resize)
            found = self.reference_of(pictures, name, features)
            return found and replace(found, sha256=_sha256_of(name, path, pictures), path=None)
        found = read_reference(path, name) if self.group.first else None
        if found:
            found.check_extractor(self.inception.sha256)
        if not self.group.broadcast(features and found is not None and found.pool is None and found.path is not None):
            return found
        batch = self.reference_of(open_pictures([path]), name, features)  # ADM's, of all statistics and some pictures
        return found and batch and replace(found, pool=batch.pool)

    def reference_of(self, pictures: PictureList, name: str, features: bool) -> Reference | None:
        """Return pictures as a reference, measured once and then read from the cache; as `reference` does."""
        features = features or len(pictures) <= FEW_TO_KEEP
        decided = {"pictures": pictures.fingerprint(), "features": features}
        identity = fingerprint(version=__version__, extractor=self.inception.sha256, **decided)
        path = cache_folder() / "references" / f"{identity[:16]}.npz"
        if not self.group.broadcast(path.is_file()):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self.quiet:
                note(f"measuring the reference {name} first, once: {len(pictures)} pictures")
            self.keep_statistics(pictures, features, path, "reference")
        return read_reference(path, name) if self.group.first else None

    def keep(self, path: Path, statistics: Statistics, side: int) -> None:
        """Write statistics of pictures of a size as a reference file."""
        pool = statistics.pool.numpy() if statistics.plan.keeps_table else None
        save_reference(path, statistics.moments(), pixels=side, extractor=self.inception.sha256, pool=pool)


def _sha256_of(name: str, path: Path, pictures: PictureList) -> str:
    """Return what tells a reference of pictures from others: of its file, or of a folder what is in it."""
    known = references().get(name)
    if known and known.sha256:
        return known.sha256
    return file_sha256(path) if path.is_file() else pictures.fingerprint()
