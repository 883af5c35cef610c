"""What `var eval` does: pictures measured against a reference, and all that is to be known of it in one result."""

import time
from base64 import b64encode
from dataclasses import dataclass
from datetime import datetime, timezone
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from varcli import __version__
from varcli.checkpoints.materials import find_inception
from varcli.checkpoints.registry import registry
from varcli.commands.eval_ask import Ask
from varcli.commands.eval_opening import opened
from varcli.commands.eval_subjects import Rebuilt, Samples, Subject
from varcli.commands.measuring import Bench
from varcli.evaluation import guards, metrics, statistics
from varcli.evaluation.inception import Inception
from varcli.evaluation.references import Reference
from varcli.evaluation.results import ClassSpread, Origin, Published, ReferenceOrigin, Result
from varcli.evaluation.statistics import Plan, Statistics
from varcli.processes import Group
from varcli.sampling.devices import pick_device

SHOWN, THUMBNAIL = 24, 128
"""Pictures in a result's file, and the most pixels a side of them."""


def evaluated(ask: Ask, group: Group) -> Result | None:
    """Return what was measured; nothing in all processes but the first.

    Raises:
        VarError: the checkpoint, a reference, weights or pictures cannot be used, or a file not be written.
    """
    begun, quiet = time.monotonic(), ask.quiet or not group.first
    device = pick_device(group.device(ask.device))
    bench = Bench(Inception(find_inception(ask.inception, progress=not quiet), device), group, quiet)
    subject, reference = opened(ask, bench, device)
    plan = Plan(count=len(subject), metrics=ask.metrics, classes=len(subject.classes))
    metrics.check(plan, reference)
    measurement, forget = bench.measure(subject, plan, "pictures", resumable=not ask.tokenizer)
    subject.join(group)
    if not group.first:
        return None
    outcome = Outcome(ask, subject, reference, bench.inception, measurement.statistics)
    found = outcome.result(measurement.seconds | {"total": time.monotonic() - begun})
    if ask.save_stats:
        bench.keep(ask.save_stats, measurement.statistics, subject.side)
    forget()
    return found


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
        return Result(
            version=__version__,
            date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            what=self.subject.what,
            checkpoint=self.subject.checkpoint,
            source=self.subject.source,
            n=self.statistics.count,
            classes=len(self.subject.classes) or None,
            reference=None if self.reference is None else _origin(self.reference),
            extractor=Origin(name=self.inception.name, sha256=self.inception.sha256),
            protocol=self.protocol(),
            metrics=figures,
            published=self.published(figures),
            per_class=self.per_class(),
            warnings=list(self.warnings(figures)),
            seconds=seconds,
            pictures=self.shown() if self.ask.out else [],
        )

    def figures(self) -> dict[str, Any]:
        """Return all figures by name; a tokenizer's distance is called by its own."""
        found: dict[str, Any] = dict(metrics.figures(self.statistics, self.reference))
        if isinstance(self.subject, Rebuilt):
            found = {name.replace("fid", "rfid"): value for name, value in found.items()}
            found |= self.subject.reconstructions.figures()
        return found

    def protocol(self) -> dict[str, Any]:
        """Return what decides the figures beside pictures, reference and network."""
        asked: dict[str, Any] = {}
        if "is" in self.ask.metrics:
            asked |= {"is_splits": statistics.SPLITS, "is_shuffle_seed": statistics.SEED}
        if "kid" in self.ask.metrics:
            asked |= {"kid_subsets": metrics.KID_SUBSETS, "kid_subset_size": metrics.KID_SUBSET_SIZE}
        if "prc" in self.ask.metrics:
            asked |= {"prc_k": metrics.PRC_NEIGHBORS}
        if isinstance(self.subject, Samples) and self.subject.classifier:
            asked |= {"rejected": self.ask.reject, "classifier": self.subject.classifier.name}
        return asked | {"pixels": self.subject.side, "resize": self.ask.resize}

    def published(self, figures: dict[str, Any]) -> Published | None:
        """Return what the paper says, and whether this agrees with what others found."""
        entry = registry().get(self.ask.checkpoint)
        if not isinstance(self.subject, Samples) or entry is None or entry.fid is None:
            return None
        band, fid = entry.fid_band, figures.get("fid")
        inside = band[0] <= round(fid, 2) <= band[1] if band and fid is not None else None
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
        found = list(guards.few_pictures(self.statistics.count, bias))
        found += self.subject.warnings()
        if self.reference:
            found += guards.other_size(self.subject.side, self.reference.pixels)
        return found

    def shown(self) -> list[str]:
        """Return some of the pictures, spread over all of them, as PNG in base64."""
        count = len(self.subject)
        ranks = range(SHOWN) if self.subject.unit > 1 else np.linspace(0, count - 1, min(SHOWN, count)).astype(int)
        wanted = sorted({int(rank) for rank in ranks if rank < count})
        return [_thumbnail(pixels) for _, batch, _ in self.subject.make(wanted) for pixels in batch]


def _origin(reference: Reference) -> ReferenceOrigin:
    return ReferenceOrigin(name=reference.name, sha256=reference.sha256, n=reference.count, pixels=reference.pixels)


def _thumbnail(pixels: Any) -> str:
    image, content = Image.fromarray(pixels), BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(content, "PNG", optimize=True)
    return b64encode(content.getvalue()).decode()
