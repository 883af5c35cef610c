"""What `var eval` and `var eval stats` share: statistics of images, and references to hold them against."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from varcli import __version__
from varcli.checkpoints.registry import cache_folder
from varcli.commands.eval_subjects import Given, Subject
from varcli.console import note, progress
from varcli.distributed import ProcessGroup
from varcli.evaluation.extractors import Inception
from varcli.evaluation.feature_pass import FeaturePass, fingerprint
from varcli.evaluation.references import (
    Reference,
    find_reference,
    holds_images,
    read_reference,
    references,
    save_reference,
)
from varcli.evaluation.statistics import EvalPlan, Statistics
from varcli.files import file_sha256
from varcli.images.dataset import ImageSet, open_images

FEW_TO_KEEP = 10_000
"""Up to so many images a reference's features are kept with its statistics, for KID, precision and recall."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What measures: the network, the processes at work, and whether they say what they do."""

    inception: Inception
    group: ProcessGroup
    quiet: bool

    def measure(
        self, subject: Subject, plan: EvalPlan, label: str, resumable: bool = True
    ) -> tuple[FeaturePass, Callable[[], None]]:
        """Return the measurement of all images, and what to call once its figures are where they belong.

        The latter forgets the file from which a killed run goes on. To be called by all processes; the first one
        has the figures.

        Raises:
            VarError: images cannot be had, or the file cannot be written.
        """
        decided = asdict(plan) | subject.identity()
        identity = fingerprint(version=__version__, extractor=self.inception.sha256, **decided)
        path = cache_folder() / "measurements" / f"{identity[:16]}.safetensors" if resumable else None
        measurement = FeaturePass(plan, identity, path, self.group)
        self._say_where(measurement, plan, label)
        resumed = bool(self.group.broadcast(measurement.statistics.count))
        with subject.ready(resumed), progress(label, plan.count, self.quiet) as advance:
            advance(measurement.statistics.count)
            try:
                measurement.run(subject.shown, self.inception, advance, subject.unit)
            except KeyboardInterrupt:
                if path and not self.quiet:
                    note(f"{measurement.statistics.count} images are measured; the same command goes on from there")
                raise
        subject.join(self.group)
        return measurement, lambda: path.unlink(missing_ok=True) if path and self.group.is_main else None

    def _say_where(self, measurement: FeaturePass, plan: EvalPlan, label: str) -> None:
        if self.quiet:
            return
        if measurement.notice:
            note(measurement.notice)
        if measurement.statistics.count:
            note(f"{label}: going on after {measurement.statistics.count} of {plan.count}")

    def keep_statistics(self, images: ImageSet, features: bool, path: Path, label: str) -> None:
        """Measure images and write their statistics as a reference, with their features if asked for."""
        plan = EvalPlan(count=len(images), metrics=("fid", "kid") if features else ("fid",))
        measurement, forget = self.measure(Given(images, []), plan, label)
        if self.group.is_main:
            self.keep(path, measurement.statistics, images.side)
        forget()
        self.group.barrier()

    def images(self, paths: Sequence[str | Path], resize: int | None, skip_bad: bool) -> ImageSet:
        """Return images that exist; what stdin lists is read by the first process, for all of them."""
        listed = "-" in map(str, paths)
        lines = self.group.broadcast(list(sys.stdin) if listed and self.group.is_main else [])
        return open_images(paths, resize=resize, skip_bad=skip_bad, lines=lines)

    # --- references --------------------------------------------------------------------------------

    def reference(self, name: str, features: bool, resize: int | None) -> Reference | None:
        """Return what to measure against, its features too if asked for; what takes long is kept for next time.

        To be called by all processes; the first one has it.

        Args:
            name: a reference known by name, a file of statistics, or a place of images.
            features: whether KID, precision or recall ask for the images' features.
            resize: side to which images of a place are cropped and resized.

        Raises:
            VarError: there is no such reference, or it cannot be used.
        """
        path = self.group.broadcast(find_reference(name, progress=not self.quiet) if self.group.is_main else None)
        assert path is not None
        if self.group.broadcast(holds_images(path) if self.group.is_main else False):
            images = open_images([path], resize=resize)
            found = self.reference_of(images, name, features)
            return found and replace(found, sha256=_sha256_of(name, path, images), path=None)
        found = read_reference(path, name) if self.group.is_main else None
        if found:
            found.check_extractor(self.inception.sha256)
        if not self.group.broadcast(features and found is not None and found.pool is None and found.path is not None):
            return found
        batch = self.reference_of(open_images([path]), name, features)  # ADM's, of all statistics and some images
        return found and batch and replace(found, pool=batch.pool)

    def reference_of(self, images: ImageSet, name: str, features: bool) -> Reference | None:
        """Return images as a reference, measured once and then read from the cache; as `reference` does."""
        features = features or len(images) <= FEW_TO_KEEP
        decided = {"pictures": images.fingerprint(), "features": features}
        identity = fingerprint(version=__version__, extractor=self.inception.sha256, **decided)
        path = cache_folder() / "references" / f"{identity[:16]}.npz"
        if not self.group.broadcast(path.is_file()):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self.quiet:
                note(f"measuring the reference {name} first, once: {len(images)} images")
            self.keep_statistics(images, features, path, "reference")
        return read_reference(path, name) if self.group.is_main else None

    def keep(self, path: Path, statistics: Statistics, side: int) -> None:
        """Write statistics of images of a size as a reference file."""
        pool = statistics.pool.numpy() if statistics.plan.keeps_table else None
        save_reference(path, statistics.moments(), pixels=side, extractor=self.inception.sha256, pool=pool)


def _sha256_of(name: str, path: Path, images: ImageSet) -> str:
    """Return what tells a reference of images from others: of its file, or of a folder what is in it."""
    known = references().get(name)
    if known and known.sha256:
        return known.sha256
    return file_sha256(path) if path.is_file() else images.fingerprint()
