"""Rejection sampling: of a class's candidates those stay that a classifier is surest of."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import chain, islice, zip_longest

import numpy as np

from varcli.commands.series import SampleRequest
from varcli.distributed import ProcessGroup
from varcli.errors import UsageError
from varcli.evaluation.classifier import Classifier
from varcli.sampling.batching import BatchSampler
from varcli.sampling.sampler import Pixels

AT_ONCE = 32
"""Images a classifier looks at."""

Made = tuple[SampleRequest, Pixels]


def surest(
    sampler: BatchSampler, classifier: Classifier, candidates: Iterable[SampleRequest], kept: int
) -> list[tuple[SampleRequest, Pixels]]:
    """Return the `kept` of a class's candidates, in their order, whose class the classifier is surest of.

    Of equally sure ones the first stay. Only those that may stay are held in memory.
    """
    best: list[tuple[float, int, Made]] = []
    made = enumerate(sampler.images(candidates))
    while part := list(islice(made, AT_ONCE)):
        pixels_BPP3 = np.stack([pixels for _, (_, pixels) in part])
        confidence_B = classifier.confidence(pixels_BPP3, [image.row for _, (image, _) in part])
        judged = [
            (float(sure), -number, (image, pixels.copy()))  # what it is a view of is a whole batch
            for sure, (number, (image, pixels)) in zip(confidence_B, part, strict=True)
        ]
        best = nlargest(kept, best + judged, key=lambda found: found[:2])
    return [one for _, _, one in sorted(best, key=lambda found: -found[1])]


@dataclass(frozen=True, slots=True)
class Election:
    """Chooses images class by class, and hands on those it has judged."""

    sampler: BatchSampler
    classifier: Classifier
    kept: int
    """How many of each class."""
    group: ProcessGroup
    """Processes that share the work."""
    _pixels: dict[SampleRequest, Pixels] = field(default_factory=dict)

    def chosen(self, classes: Iterable[Iterable[SampleRequest]]) -> Iterator[list[SampleRequest]]:
        """Yield which of each class's candidates stay.

        Several processes judge a class each, at once, and then make the chosen images once more, wherever they are
        wanted: so all of them are to call this, and to use up what it yields. One process goes class by class.

        Raises:
            UsageError: candidates are not all of one class, or would not be the same images when made once more.
        """
        if self.group.world_size == 1:
            for candidates in classes:
                self._pixels.clear()
                self._pixels.update(self._surest(candidates))
                yield list(self._pixels)
            return
        if self.sampler.batch_size > 1:
            raise UsageError("best: with several processes in 16 bits on a GPU; one process, or --dtype fp32")
        mine = [[image for image, _ in self._surest(candidates)] for candidates in self.group.shard(classes)]
        shares = self.group.broadcast(self.group.gather(mine))
        yield from filter(None, chain.from_iterable(zip_longest(*shares)))

    def images(self, wanted: Iterable[SampleRequest]) -> Iterator[Made]:
        """Yield chosen images, as they were judged where they are still at hand."""
        for image in wanted:
            if image in self._pixels:
                yield image, self._pixels.pop(image)
            else:
                yield from self.sampler.images([image])

    def _surest(self, candidates: Iterable[SampleRequest]) -> list[Made]:
        found = list(candidates)
        if None in (ids := {image.made.class_id for image in found}) or len(ids) > 1:
            raise UsageError("best: with none or random; classes, of which a classifier can tell how well they are met")
        return surest(self.sampler, self.classifier, found, self.kept)
