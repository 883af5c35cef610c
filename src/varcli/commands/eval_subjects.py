"""What `var eval` measures: pictures it makes, pictures that exist, or pictures taken through a tokenizer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from varcli.commands.election import surest
from varcli.commands.series import Picture
from varcli.config import SampleConfig
from varcli.data.classes import ClassTable
from varcli.data.images import Provenance
from varcli.data.outputs import find_output
from varcli.data.places import Output, picture_name
from varcli.evaluation import guards
from varcli.evaluation.gallery import Gallery
from varcli.evaluation.measurement import Batch
from varcli.evaluation.pictures import PictureList
from varcli.evaluation.ranking import Classifier
from varcli.evaluation.reconstructions import Reconstructions
from varcli.models.tokenizer import Tokenizer
from varcli.processes import Group
from varcli.sampling.batches import BatchSampler
from varcli.sampling.reconstruction import there_and_back
from varcli.sampling.sampler import Pixels

BATCH = 32
"""Pictures handed over at a time, where nothing else says how many."""


class Subject(ABC):
    """Pictures to measure; a picture's rank is its number among them."""

    what: str
    """Kind of it, as results name it."""
    side: int
    """Pixels a side."""
    classes: ClassTable
    """Classes they are of; empty where that is not known."""
    rows: Sequence[int]
    """Each picture's row of that table, -1 where it has none."""
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
        """Return all that decides the pictures."""

    @abstractmethod
    def make(self, ranks: Sequence[int]) -> Iterator[Batch]:
        """Yield the pictures of these ranks, in batches."""

    def shown(self, ranks: Sequence[int]) -> Iterator[Batch]:
        """Yield the pictures of these ranks, some of which stay in the gallery."""
        return self.gallery.watched(self.make(ranks))

    @contextmanager
    def ready(self, resumed: bool) -> Iterator[None]:
        """Do what belongs around the measuring, which goes on where an earlier run was if `resumed`."""
        yield

    def join(self, group: Group) -> None:
        """Take in what other processes found out; to be called by all, the first one has it then."""
        for found in group.gather(self.gallery.found):
            self.gallery.found |= found

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable."""
        yield from guards.imbalance(self.rows, [entry.name for entry in self.classes.entries])


class Samples(Subject):
    """Pictures made with a checkpoint, class after class."""

    what = "samples"

    def __init__(
        self,
        *,
        sampler: BatchSampler,
        classes: ClassTable,
        candidates: Mapping[int, Sequence[Picture]],
        kept: Mapping[int, int],
        preset: SampleConfig,
        classifier: Classifier | None = None,
        save_images: str | None = None,
    ) -> None:
        """Take pictures to be made.

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
            row: sorted(pictures, key=lambda picture: picture_name(picture.made))
            for row, pictures in candidates.items()
        }
        self.candidates = dict(sorted(ordered.items(), key=lambda of_row: picture_name(of_row[1][0].made)))
        self.preset, self.classifier, self.save_images = preset, classifier, save_images
        self.side = sampler.tokenizer.config.pixels
        self.rows = [row for row in self.candidates for _ in range(kept[row])]
        self.unit = max(kept.values()) if classifier else sampler.batch_size
        self.output: Output | None = None
        self.origin: Provenance = next(iter(candidates.values()))[0].made
        names = ("cfg", "top_k", "top_p", "smooth", "draft", "seed", "device", "dtype")
        made = asdict(self.origin)
        self.checkpoint = {"name": made["checkpoint"], "sha256": made["checkpoint_sha256"]} | {
            name: made[name] for name in names
        }
        self._first = {row: rank for rank, row in reversed(list(enumerate(self.rows)))}

    def identity(self) -> dict[str, Any]:
        """Return all that decides the pictures."""
        drawn = {row: len(pictures) for row, pictures in self.candidates.items()}
        chosen = self.classifier and self.classifier.sha256
        place = self.save_images and str(Path(self.save_images).resolve())  # another one lacks what is done
        asked = {"drawn": drawn, "kept": dict(self.kept), "chosen": chosen, "place": place}
        return {"made": asdict(self.origin.settings())} | asked

    def make(self, ranks: Sequence[int]) -> Iterator[Batch]:
        """Yield the pictures of these ranks, in batches."""
        made = self._chosen(ranks) if self.classifier else self._all(ranks)
        while batch := list(islice(made, BATCH)):
            found, pictures, pixels = zip(*batch, strict=True)
            yield found, np.stack(pixels), [picture.row for picture in pictures]

    def _all(self, ranks: Sequence[int]) -> Iterator[tuple[int, Picture, Pixels]]:
        wanted = [self.candidates[self.rows[rank]][rank - self._first[self.rows[rank]]] for rank in ranks]
        for rank, (picture, pixels) in zip(ranks, self.sampler.pictures(wanted), strict=True):
            self._keep(picture, pixels)
            yield rank, picture, pixels

    def _chosen(self, ranks: Sequence[int]) -> Iterator[tuple[int, Picture, Pixels]]:
        assert self.classifier is not None
        for row, of_class in groupby(ranks, key=self.rows.__getitem__):
            chosen = surest(self.sampler, self.classifier, self.candidates[row], self.kept[row])
            for rank in of_class:
                picture, pixels = chosen[rank - self._first[row]]
                self._keep(picture, pixels)
                yield rank, picture, pixels

    def _keep(self, picture: Picture, pixels: Pixels) -> None:
        if self.output and not self.output.has(picture.made):
            self.output.add(pixels, picture.made)

    @contextmanager
    def ready(self, resumed: bool) -> Iterator[None]:
        """Keep the pictures where that is asked for, while this lasts."""
        if self.save_images is None:
            yield
            return
        output = find_output(self.save_images, several=True)
        output.open(resumed)
        with output:
            self.output = output
            yield
            self.output = None

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable."""
        yield from super().warnings()
        yield from guards.other_settings(asdict(self.sampler.config), asdict(self.preset))
        yield from guards.other_precision(self.origin.dtype)
        if self.classifier:
            yield from guards.rejection(self.classifier.name)


class Given(Subject):
    """Pictures that exist."""

    what = "pictures"

    def __init__(self, pictures: PictureList, paths: Sequence[str]) -> None:
        super().__init__()
        self.pictures = pictures
        self.side, self.classes, self.rows = pictures.side, pictures.classes, pictures.rows
        self.source = {"paths": list(paths)}

    def identity(self) -> dict[str, Any]:
        """Return all that decides the pictures."""
        return {"pictures": self.pictures.fingerprint()}

    def make(self, ranks: Sequence[int]) -> Iterator[Batch]:
        """Yield the pictures of these ranks, in batches."""
        return self.pictures.batches(ranks, BATCH)

    def join(self, group: Group) -> None:
        """Take in which pictures other processes could not read."""
        super().join(group)
        found = group.gather(self.pictures.skipped)
        self.pictures.skipped = sorted({name for names in found for name in names})

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable."""
        yield from super().warnings()
        yield from guards.lossy(self.pictures.jpegs, len(self))
        yield from guards.skipped(self.pictures.skipped)


class Rebuilt(Given):
    """Pictures that exist, taken through a tokenizer and back."""

    what = "tokenizer"

    def __init__(
        self,
        pictures: PictureList,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        reconstructions: Reconstructions,
        checkpoint: Mapping[str, Any],
    ) -> None:
        """Take pictures, a tokenizer in evaluation mode, and where to count what each picture lost."""
        super().__init__(pictures, paths)
        self.tokenizer, self.reconstructions, self.checkpoint = tokenizer, reconstructions, checkpoint

    def identity(self) -> dict[str, Any]:
        """Return all that decides the pictures."""
        assert self.checkpoint is not None
        return super().identity() | {"tokenizer": self.checkpoint["sha256"]}

    def make(self, ranks: Sequence[int]) -> Iterator[Batch]:
        """Yield the pictures of these ranks, rebuilt, in batches."""
        for found, before_BPP3, rows in super().make(ranks):
            after_BPP3, tokens = there_and_back(self.tokenizer, before_BPP3)
            self.reconstructions.add(before_BPP3, after_BPP3, tokens)
            yield found, after_BPP3, rows

    def join(self, group: Group) -> None:
        """Take in what other processes counted."""
        super().join(group)
        self.reconstructions.join(group)

    def warnings(self) -> Iterator[str]:
        """Yield what makes their figures incomparable; JPEG pictures are what a tokenizer is there for."""
        yield from guards.skipped(self.pictures.skipped)
