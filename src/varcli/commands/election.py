"""Rejection sampling: of a class's candidates those stay that a classifier is surest of."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np

from varcli.commands.series import Picture
from varcli.errors import UsageError
from varcli.evaluation.ranking import Classifier, best
from varcli.processes import Group
from varcli.sampling.batches import BatchSampler
from varcli.sampling.sampler import Pixels

AT_ONCE = 32
"""Pictures a classifier looks at."""


def surest(
    sampler: BatchSampler, classifier: Classifier, candidates: Sequence[Picture], kept: int
) -> list[tuple[Picture, Pixels]]:
    """Return the `kept` of a class's candidates, in their order, whose class the classifier is surest of."""
    made = list(sampler.pictures(candidates))
    parts = [made[at : at + AT_ONCE] for at in range(0, len(made), AT_ONCE)]
    confidence = [
        classifier.confidence(np.stack([pixels for _, pixels in part]), [picture.row for picture, _ in part])
        for part in parts
    ]
    return [made[i] for i in best(np.concatenate(confidence), kept)]


@dataclass(frozen=True, slots=True)
class Election:
    """Chooses pictures, which are made once more then: so nothing but their seeds need be held, or handed on."""

    sampler: BatchSampler
    classifier: Classifier
    kept: int
    """How many of each class."""
    group: Group
    """Processes that share the work, class by class."""

    def chosen(self, classes: Iterable[Iterable[Picture]]) -> Iterator[list[Picture]]:
        """Yield which of each class's candidates stay; to be called by all processes.

        Raises:
            UsageError: candidates are not all of one class.
        """
        if self.group.count == 1:
            yield from map(self._chosen, classes)
            return
        mine = [self._chosen(candidates) for candidates in self.group.share(classes)]
        shares = self.group.broadcast(self.group.gather(mine))
        yield from filter(None, chain.from_iterable(zip_longest(*shares)))

    def _chosen(self, candidates: Iterable[Picture]) -> list[Picture]:
        found = list(candidates)
        if None in (ids := {picture.made.class_id for picture in found}) or len(ids) > 1:
            raise UsageError("best: with none or random; classes, of which a classifier can tell how well they are met")
        return [picture for picture, _ in surest(self.sampler, self.classifier, found, self.kept)]
