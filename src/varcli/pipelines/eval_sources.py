"""What `var eval` measures: sampled images, existing images, or a tokenizer's reconstructions."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from varcli.classes import ClassTable
from varcli.config import SampleConfig
from varcli.distributed import ProcessGroup
from varcli.evaluation import comparability
from varcli.evaluation.feature_pass import Batch
from varcli.evaluation.reconstruction import Reconstructions
from varcli.evaluation.results import Gallery
from varcli.images.dataset import ImageSet
from varcli.images.provenance import Provenance, image_filename
from varcli.models.tokenizer import Tokenizer
from varcli.outputs.open import find_sink
from varcli.outputs.sinks import Sink
from varcli.pipelines.rejection import Confidence, best_candidates
from varcli.pipelines.requests import SampleRequest
from varcli.sampling.batching import BatchSampler
from varcli.sampling.reconstruction import there_and_back
from varcli.sampling.sampler import Pixels

BATCH = 32
"""Default number of images per batch."""


class EvalSource(ABC):
    """Images to measure, each known by its index."""

    what: str
    """Kind of source, as results name it."""
    side: int
    """Pixels per side."""
    classes: ClassTable
    """Classes of the images; empty where they are not known."""
    labels: Sequence[int]
    """Index of each image's class in that table, -1 where it is not known."""
    unit = 1
    """How many consecutive images are best produced together."""
    checkpoint: Mapping[str, Any] | None = None
    """The checkpoint that sampled or reconstructed them, as results say it."""
    source: Mapping[str, Any] | None = None
    """Their paths, as results say it."""

    def __init__(self) -> None:
        self.gallery = Gallery()
        """Thumbnails of some of them, for a report."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that determines the images."""

    @abstractmethod
    def make(self, indices: Sequence[int]) -> Iterator[Batch]:
        """Yield the images of these indices, in batches."""

    def watched(self, indices: Sequence[int]) -> Iterator[Batch]:
        """Yield the images of these indices; the gallery keeps thumbnails of some."""
        return self.gallery.watched(self.make(indices))

    @contextmanager
    def ready(self, resumed: bool) -> Iterator[None]:
        """Wrap the measurement, which continues an earlier run if `resumed`."""
        yield

    def join(self, group: ProcessGroup) -> None:
        """Collect what other ranks found in the main rank; to be called by all."""
        for found in group.gather(self.gallery.found):
            self.gallery.found |= found

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable."""
        yield from comparability.imbalance(self.labels, [entry.name for entry in self.classes.entries])


class Samples(EvalSource):
    """Images sampled with a checkpoint, class after class."""

    what = "samples"

    def __init__(
        self,
        *,
        sampler: BatchSampler,
        classes: ClassTable,
        candidates: Mapping[int, Sequence[SampleRequest]],
        kept: Mapping[int, int],
        preset: SampleConfig,
        classifier: Confidence | None = None,
        decide_at: int | None = None,
        save_images: str | None = None,
    ) -> None:
        """Take images to be sampled.

        Args:
            sampler: samples them.
            classes: the checkpoint's.
            candidates: requests of each label, in order.
            kept: how many of each label are measured: the first ones, or those of highest confidence.
            preset: settings of published figures.
            classifier: chooses among candidates; None where all are measured.
            decide_at: after which scale it chooses, the coarsest being 1; None is after the last.
            save_images: path where they are also written.
        """
        super().__init__()
        self.sampler, self.classes, self.kept = sampler, classes, kept
        # In the order of their file names, as if they were measured from files.
        ordered = {
            label: sorted(requests, key=lambda request: image_filename(request.provenance))
            for label, requests in candidates.items()
        }
        self.candidates = dict(sorted(ordered.items(), key=lambda item: image_filename(item[1][0].provenance)))
        self.preset, self.classifier, self.decide_at, self.save_images = preset, classifier, decide_at, save_images
        self.side = sampler.tokenizer.config.pixels
        self.labels = [label for label in self.candidates for _ in range(kept[label])]
        self.unit = max(kept.values()) if classifier else sampler.batch_size
        self.sink: Sink | None = None
        self.provenance: Provenance = next(iter(candidates.values()))[0].provenance
        self.checkpoint = {
            "name": self.provenance.checkpoint,
            "sha256": self.provenance.checkpoint_sha256,
            "refiner_sha256": self.provenance.refiner_sha256,
            **asdict(self.provenance.settings),
            **{name: getattr(self.provenance, name) for name in ("seed", "device", "dtype")},
        }
        self._first = {label: index for index, label in reversed(list(enumerate(self.labels)))}

    def identity(self) -> dict[str, Any]:
        """Everything that determines the images, under the names that unfinished runs use."""
        known = self.provenance.identity()
        common = known.to_dict()
        common["draft"] = common.pop("approximate")
        # Runs that began before a setting existed do not name it; the refiner's hash is among the settings.
        for name in asdict(known.settings).keys() - known.settings.stated().keys() - {"smooth", "approximate"}:
            del common[name]
        del common["refiner_sha256"]
        drawn = {label: len(requests) for label, requests in self.candidates.items()}
        chosen = self.classifier and self.classifier.sha256
        # Another folder or archive lacks the images written so far.
        place = self.save_images and str(Path(self.save_images).resolve())
        decided = {} if self.decide_at is None else {"decide_at": self.decide_at}
        return {"made": common, "drawn": drawn, "kept": dict(self.kept), "chosen": chosen, "place": place} | decided

    def make(self, indices: Sequence[int]) -> Iterator[Batch]:
        """Yield the images of these indices, in batches."""
        sampled = self._best(indices) if self.classifier else self._all(indices)
        while batch := list(islice(sampled, BATCH)):
            found, requests, pixels = zip(*batch, strict=True)
            yield found, np.stack(pixels), [request.label for request in requests]

    def _all(self, indices: Sequence[int]) -> Iterator[tuple[int, SampleRequest, Pixels]]:
        requests = [self.candidates[self.labels[index]][index - self._first[self.labels[index]]] for index in indices]
        for index, (request, pixels) in zip(indices, self.sampler.images(requests), strict=True):
            self._save(request, pixels)
            yield index, request, pixels

    def _best(self, indices: Sequence[int]) -> Iterator[tuple[int, SampleRequest, Pixels]]:
        assert self.classifier is not None
        for label, of_class in groupby(indices, key=self.labels.__getitem__):
            candidates, kept = self.candidates[label], self.kept[label]
            best = best_candidates(self.sampler, self.classifier, candidates, kept, self.decide_at)
            for index in of_class:
                request, image = best[index - self._first[label]]
                pixels = next(image)
                self._save(request, pixels)
                yield index, request, pixels

    def _save(self, request: SampleRequest, pixels: Pixels) -> None:
        if self.sink and not self.sink.has(request.provenance):
            self.sink.add(pixels, request.provenance)

    @contextmanager
    def ready(self, resumed: bool) -> Iterator[None]:
        """Keep the sink of the images open meanwhile, if they are written."""
        if self.save_images is None:
            yield
            return
        sink = find_sink(self.save_images, several=True)
        sink.open(resumed)
        with sink:
            self.sink = sink
            yield
            self.sink = None

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable."""
        yield from super().warnings()
        yield from comparability.other_settings(asdict(self.sampler.config), asdict(self.preset))
        yield from comparability.other_precision(self.provenance.dtype)
        if self.classifier:
            yield from comparability.rejection(self.classifier.name)


class ExistingImages(EvalSource):
    """Existing images."""

    what = "images"

    def __init__(self, images: ImageSet, paths: Sequence[str]) -> None:
        super().__init__()
        self.images = images
        self.side, self.classes, self.labels = images.side, images.classes, images.labels
        self.source = {"paths": list(paths)}

    def identity(self) -> dict[str, Any]:
        """Everything that determines the images."""
        return {"pictures": self.images.fingerprint()}

    def make(self, indices: Sequence[int]) -> Iterator[Batch]:
        """Yield the images of these indices, in batches."""
        return self.images.batches(indices, BATCH)

    def join(self, group: ProcessGroup) -> None:
        """Collect which images other ranks could not read."""
        super().join(group)
        found = group.gather(self.images.skipped)
        self.images.skipped = sorted({name for names in found for name in names})

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable."""
        yield from super().warnings()
        yield from comparability.lossy(self.images.jpegs, len(self))
        yield from comparability.several_series(self.images.series())
        yield from comparability.skipped(self.images.skipped)


class Reconstructed(ExistingImages):
    """Existing images, encoded and decoded by a tokenizer."""

    what = "tokenizer"

    def __init__(
        self,
        images: ImageSet,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        reconstructions: Reconstructions,
        checkpoint: Mapping[str, Any],
    ) -> None:
        """Take images, a tokenizer in evaluation mode, and what sums up the losses."""
        super().__init__(images, paths)
        self.tokenizer, self.reconstructions, self.checkpoint = tokenizer, reconstructions, checkpoint

    def identity(self) -> dict[str, Any]:
        """Everything that determines the images."""
        assert self.checkpoint is not None
        return super().identity() | {"tokenizer": self.checkpoint["sha256"]}

    def make(self, indices: Sequence[int]) -> Iterator[Batch]:
        """Yield reconstructions of the images of these indices, in batches."""
        for batch_indices, before_BPP3, labels in super().make(indices):
            after_BPP3, tokens = there_and_back(self.tokenizer, before_BPP3)
            self.reconstructions.add(before_BPP3, after_BPP3, tokens)
            yield batch_indices, after_BPP3, labels

    def join(self, group: ProcessGroup) -> None:
        """Collect what other ranks summed up."""
        super().join(group)
        self.reconstructions.join(group)

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable; JPEG does no harm as a tokenizer's input."""
        yield from comparability.skipped(self.images.skipped)
