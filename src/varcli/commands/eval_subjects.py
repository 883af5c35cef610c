"""What `var eval` measures: images it makes, images that exist, or images taken through a tokenizer."""

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
from varcli.evaluation.classifier import Classifier
from varcli.evaluation.feature_pass import Batch
from varcli.evaluation.reconstruction import Reconstructions
from varcli.evaluation.results import Gallery
from varcli.images.dataset import ImageSet
from varcli.images.provenance import Provenance, image_filename
from varcli.models.tokenizer import Tokenizer
from varcli.outputs.open import find_sink
from varcli.outputs.sinks import Sink
from varcli.pipelines.rejection import best_candidates
from varcli.pipelines.requests import SampleRequest
from varcli.sampling.batching import BatchSampler
from varcli.sampling.reconstruction import there_and_back
from varcli.sampling.sampler import Pixels

BATCH = 32
"""Images handed over at a time, where nothing else says how many."""


class Subject(ABC):
    """Images to measure; an image's rank is its number among them."""

    what: str
    """Kind of it, as results name it."""
    side: int
    """Pixels a side."""
    classes: ClassTable
    """Classes they are of; empty where that is not known."""
    rows: Sequence[int]
    """Each image's row of that table, -1 where it has none."""
    unit = 1
    """How many of neighbouring rank are best made together."""
    checkpoint: Mapping[str, Any] | None = None
    """What made them, as results say it."""
    source: Mapping[str, Any] | None = None
    """Where they lie, as results say it."""

    def __init__(self) -> None:
        self.gallery = Gallery()
        """Some of them, for a report."""

    def __len__(self) -> int:
        return len(self.rows)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return all that decides the images."""

    @abstractmethod
    def make(self, ranks: Sequence[int]) -> Iterator[Batch]:
        """Yield the images of these ranks, in batches."""

    def shown(self, ranks: Sequence[int]) -> Iterator[Batch]:
        """Yield the images of these ranks, some of which stay in the gallery."""
        return self.gallery.watched(self.make(ranks))

    @contextmanager
    def ready(self, resumed: bool) -> Iterator[None]:
        """Do what belongs around the measuring, which goes on where an earlier run was if `resumed`."""
        yield

    def join(self, group: ProcessGroup) -> None:
        """Take in what other processes found out; to be called by all, the first one has it then."""
        for found in group.gather(self.gallery.found):
            self.gallery.found |= found

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable."""
        yield from comparability.imbalance(self.rows, [entry.name for entry in self.classes.entries])


class Samples(Subject):
    """Images made with a checkpoint, class after class."""

    what = "samples"

    def __init__(
        self,
        *,
        sampler: BatchSampler,
        classes: ClassTable,
        candidates: Mapping[int, Sequence[SampleRequest]],
        kept: Mapping[int, int],
        preset: SampleConfig,
        classifier: Classifier | None = None,
        save_images: str | None = None,
    ) -> None:
        """Take images to be made.

        Args:
            sampler: makes them.
            classes: the checkpoint's.
            candidates: those of each row of its class table, in order.
            kept: how many of each are measured: the first ones, or those that a classifier is surest of.
            preset: how published figures were made.
            classifier: chooses them; None where there are as many candidates.
            save_images: place where they are kept too.
        """
        super().__init__()
        self.sampler, self.classes, self.kept = sampler, classes, kept
        # In the order of their files' names, in which files of them would be measured.
        ordered = {
            row: sorted(images, key=lambda image: image_filename(image.provenance))
            for row, images in candidates.items()
        }
        self.candidates = dict(sorted(ordered.items(), key=lambda of_row: image_filename(of_row[1][0].provenance)))
        self.preset, self.classifier, self.save_images = preset, classifier, save_images
        self.side = sampler.tokenizer.config.pixels
        self.rows = [row for row in self.candidates for _ in range(kept[row])]
        self.unit = max(kept.values()) if classifier else sampler.batch_size
        self.output: Sink | None = None
        self.origin: Provenance = next(iter(candidates.values()))[0].provenance
        self.checkpoint = {
            "name": self.origin.checkpoint,
            "sha256": self.origin.checkpoint_sha256,
            **asdict(self.origin.settings),
            **{name: getattr(self.origin, name) for name in ("seed", "device", "dtype")},
        }
        self._first = {row: rank for rank, row in reversed(list(enumerate(self.rows)))}

    def identity(self) -> dict[str, Any]:
        """Return all that decides the images."""
        drawn = {row: len(images) for row, images in self.candidates.items()}
        chosen = self.classifier and self.classifier.sha256
        place = self.save_images and str(Path(self.save_images).resolve())  # another one lacks what is done
        asked = {"drawn": drawn, "kept": dict(self.kept), "chosen": chosen, "place": place}
        return {"made": self._made()} | asked

    def _made(self) -> dict[str, Any]:
        """All that the images have in common, as unfinished runs name it."""
        facts = self.origin.identity().to_dict()
        facts["draft"] = facts.pop("approximate")
        return facts

    def make(self, ranks: Sequence[int]) -> Iterator[Batch]:
        """Yield the images of these ranks, in batches."""
        made = self._chosen(ranks) if self.classifier else self._all(ranks)
        while batch := list(islice(made, BATCH)):
            found, images, pixels = zip(*batch, strict=True)
            yield found, np.stack(pixels), [image.label for image in images]

    def _all(self, ranks: Sequence[int]) -> Iterator[tuple[int, SampleRequest, Pixels]]:
        wanted = [self.candidates[self.rows[rank]][rank - self._first[self.rows[rank]]] for rank in ranks]
        for rank, (image, pixels) in zip(ranks, self.sampler.images(wanted), strict=True):
            self._keep(image, pixels)
            yield rank, image, pixels

    def _chosen(self, ranks: Sequence[int]) -> Iterator[tuple[int, SampleRequest, Pixels]]:
        assert self.classifier is not None
        for row, of_class in groupby(ranks, key=self.rows.__getitem__):
            chosen = best_candidates(self.sampler, self.classifier, self.candidates[row], self.kept[row])
            for rank in of_class:
                image, pixels = chosen[rank - self._first[row]]
                self._keep(image, pixels)
                yield rank, image, pixels

    def _keep(self, image: SampleRequest, pixels: Pixels) -> None:
        if self.output and not self.output.has(image.provenance):
            self.output.add(pixels, image.provenance)

    @contextmanager
    def ready(self, resumed: bool) -> Iterator[None]:
        """Keep the images where that is asked for, while this lasts."""
        if self.save_images is None:
            yield
            return
        output = find_sink(self.save_images, several=True)
        output.open(resumed)
        with output:
            self.output = output
            yield
            self.output = None

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable."""
        yield from super().warnings()
        yield from comparability.other_settings(asdict(self.sampler.config), asdict(self.preset))
        yield from comparability.other_precision(self.origin.dtype)
        if self.classifier:
            yield from comparability.rejection(self.classifier.name)


class Given(Subject):
    """Images that exist."""

    what = "pictures"

    def __init__(self, images: ImageSet, paths: Sequence[str]) -> None:
        super().__init__()
        self.images = images
        self.side, self.classes, self.rows = images.side, images.classes, images.labels
        self.source = {"paths": list(paths)}

    def identity(self) -> dict[str, Any]:
        """Return all that decides the images."""
        return {"pictures": self.images.fingerprint()}

    def make(self, ranks: Sequence[int]) -> Iterator[Batch]:
        """Yield the images of these ranks, in batches."""
        return self.images.batches(ranks, BATCH)

    def join(self, group: ProcessGroup) -> None:
        """Take in which images other processes could not read."""
        super().join(group)
        found = group.gather(self.images.skipped)
        self.images.skipped = sorted({name for names in found for name in names})

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable."""
        yield from super().warnings()
        yield from comparability.lossy(self.images.jpegs, len(self))
        yield from comparability.skipped(self.images.skipped)


class Rebuilt(Given):
    """Images that exist, taken through a tokenizer and back."""

    what = "tokenizer"

    def __init__(
        self,
        images: ImageSet,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        reconstructions: Reconstructions,
        checkpoint: Mapping[str, Any],
    ) -> None:
        """Take images, a tokenizer in evaluation mode, and where to count what each image lost."""
        super().__init__(images, paths)
        self.tokenizer, self.reconstructions, self.checkpoint = tokenizer, reconstructions, checkpoint

    def identity(self) -> dict[str, Any]:
        """Return all that decides the images."""
        assert self.checkpoint is not None
        return super().identity() | {"tokenizer": self.checkpoint["sha256"]}

    def make(self, ranks: Sequence[int]) -> Iterator[Batch]:
        """Yield the images of these ranks, rebuilt, in batches."""
        for found, before_BPP3, rows in super().make(ranks):
            after_BPP3, tokens = there_and_back(self.tokenizer, before_BPP3)
            self.reconstructions.add(before_BPP3, after_BPP3, tokens)
            yield found, after_BPP3, rows

    def join(self, group: ProcessGroup) -> None:
        """Take in what other processes counted."""
        super().join(group)
        self.reconstructions.join(group)

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable; JPEG images are what a tokenizer is there for."""
        yield from comparability.skipped(self.images.skipped)
