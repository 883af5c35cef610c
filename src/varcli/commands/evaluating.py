"""What `var eval` does: images measured against a reference, and all that is to be known of it in one result."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from varcli import __version__
from varcli.acceleration.devices import pick_device
from varcli.checkpoints.registry import registry
from varcli.commands.eval_ask import Ask
from varcli.commands.eval_opening import opened
from varcli.commands.eval_subjects import Rebuilt, Samples, Subject
from varcli.commands.measuring import Bench
from varcli.distributed import ProcessGroup
from varcli.evaluation import comparability, metrics, statistics
from varcli.evaluation.extractors import Inception
from varcli.evaluation.references import Reference, find_inception
from varcli.evaluation.results import ClassSpread, Origin, Published, ReferenceOrigin, Result
from varcli.evaluation.statistics import EvalPlan, Statistics


def evaluated(ask: Ask, group: ProcessGroup) -> tuple[Result | None, Callable[[], None]]:
    """Return what was measured, nothing in all processes but the first, and what to call once it is told.

    Raises:
        VarError: the checkpoint, a reference, weights or images cannot be used, or a file not be written.
    """
    begun, quiet = time.monotonic(), ask.quiet or not group.is_main
    device = pick_device(group.device(ask.device))
    bench = Bench(Inception(find_inception(ask.inception, progress=not quiet), device), group, quiet)
    subject, reference = opened(ask, bench, device)
    plan = EvalPlan(count=len(subject), metrics=ask.metrics, classes=len(subject.classes))
    if group.is_main:
        metrics.check(plan, reference)
    if ask.out:
        subject.gallery.open(len(subject))
    measurement, forget = bench.measure(subject, plan, "images", resumable=not ask.tokenizer)
    if not group.is_main:
        return None, forget
    metrics.check_found(measurement.statistics, reference)
    outcome = Outcome(ask, subject, reference, bench.inception, measurement.statistics)
    found = outcome.result(measurement.seconds | {"total": time.monotonic() - begun})
    if ask.save_stats:
        bench.keep(ask.save_stats, measurement.statistics, subject.side)
    return found, forget


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything from which a result follows."""

    ask: Ask
    subject: Subject
    reference: Reference | None
    inception: Inception
    statistics: Statistics

    def result(self, seconds: dict[str, float]) -> Result:
        """Return the result."""
        figures = self.figures()
        warnings = self.warnings(figures)
        return Result(
            version=__version__,
            date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            what=self.subject.what,
            checkpoint=self.subject.checkpoint,
            source=self.subject.source,
            n=self.statistics.count,
            classes=len({row for row in self.subject.rows if row >= 0}) or None,
            reference=None if self.reference is None else _origin(self.reference),
            extractor=Origin(name=self.inception.name, sha256=self.inception.sha256),
            protocol=self.protocol(),
            metrics=figures,
            published=self.published(figures, comparable=not warnings),
            per_class=self.per_class(),
            warnings=warnings,
            seconds=seconds,
            images=self.subject.gallery.images(),
        )

    def figures(self) -> dict[str, Any]:
        """Return all figures by name; a tokenizer's distance is called by its own."""
        found: dict[str, Any] = dict(metrics.figures(self.statistics, self.reference))
        if isinstance(self.subject, Rebuilt):
            found = {name.replace("fid", "rfid"): value for name, value in found.items()}
            found |= self.subject.reconstructions.figures()
        return found

    def protocol(self) -> dict[str, Any]:
        """Return what decides the figures beside images, reference and network."""
        asked: dict[str, Any] = {}
        if "is" in self.ask.metrics:
            asked |= {"is_splits": statistics.SPLITS, "is_shuffle_seed": statistics.SEED}
        if "kid" in self.ask.metrics:
            asked |= {"kid_subsets": metrics.KID_SUBSETS, "kid_subset_size": metrics.KID_SUBSET_SIZE}
        if "prc" in self.ask.metrics:
            asked |= {"prc_k": metrics.PRC_NEIGHBORS}
        if isinstance(self.subject, Samples) and self.subject.classifier:
            asked |= {"best_of": self.ask.best_of, "classifier": self.subject.classifier.name}
        return asked | {"pixels": self.subject.side, "resize": self.ask.resize}

    def published(self, figures: dict[str, Any], comparable: bool) -> Published | None:
        """Return what the paper says, and whether this agrees with what others found."""
        entry = registry().get(self.ask.checkpoint)
        if not isinstance(self.subject, Samples) or entry is None or entry.fid is None:
            return None
        band, fid = entry.fid_band, figures.get("fid")
        inside = band[0] <= round(fid, 2) <= band[1] if comparable and band and fid is not None else None
        return Published(fid=entry.fid, inception_score=entry.inception_score, band=band, inside=inside)

    def per_class(self) -> list[ClassSpread] | None:
        """Return each class's spread, nothing where classes are not known."""
        entries = self.subject.classes.entries
        if not entries:
            return None
        found = self.statistics.spreads()
        return [
            ClassSpread(id=entries[row].id, name=entries[row].name, n=count, spread=spread)
            for row, (count, spread) in found.items()
        ]

    def warnings(self, figures: dict[str, Any]) -> list[str]:
        """Return what makes the figures incomparable with published ones."""
        bias = figures.get("fid_bias", figures.get("rfid_bias"))
        found = list(comparability.few_images(self.statistics.count, bias))
        found += self.subject.warnings()
        if self.reference:
            found += comparability.other_size(self.subject.side, self.reference.pixels)
            found += comparability.small_reference(self.reference.count)
            entry = registry().get(self.ask.checkpoint)
            if isinstance(self.subject, Samples) and entry and entry.fid:
                found += comparability.other_reference(self.reference.name, entry.reference or "")
        return found


def _origin(reference: Reference) -> ReferenceOrigin:
    return ReferenceOrigin(name=reference.name, sha256=reference.sha256, n=reference.count, pixels=reference.pixels)
