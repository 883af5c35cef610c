"""Rejection sampling: keep those of a class's candidates that a classifier is most confident of.

Source: VQ-VAE-2 (arXiv 1906.00446), section 3.3; the paper's table 1 marks such figures "-re".
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import nlargest
from itertools import chain, islice, zip_longest
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from varcli.distributed import ProcessGroup
from varcli.errors import UsageError
from varcli.evaluation.classifier import Classifier
from varcli.pipelines.model import Model
from varcli.pipelines.requests import SampleRequest
from varcli.sampling.batching import BatchSampler
from varcli.sampling.likelihood import log_probabilities
from varcli.sampling.reconstruction import encode
from varcli.sampling.sampler import Pixels

CLASSIFIER_BATCH = 32
"""Images that a classifier sees at a time."""


class Confidence(Protocol):
    """Rates how confidently an image shows its class."""

    name: str
    sha256: str
    """Of the weights."""

    def confidence(self, pixels_BPP3: NDArray[np.uint8], labels: Sequence[int]) -> NDArray[np.float64]:
        """Return a confidence for each image, (B,); only those of one class are compared."""


class SelfClassifier:
    """A model that judges its own samples, so that no other network is needed.

    By Bayes' rule log p(class | image) is log p(image | class) - log p(image), and a constant for each class. The
    model gives both, the second as the likelihood given "no class".
    """

    name = "self"

    def __init__(self, model: Model) -> None:
        self.sha256 = model.sha256
        self.tokenizer, self.transformer = model.prepared.tokenizer, model.prepared.transformer

    def confidence(self, pixels_BPP3: NDArray[np.uint8], labels: Sequence[int]) -> NDArray[np.float64]:
        """Return the gain in log-likelihood of each image given its label, over no class, in nats, (B,)."""
        tokens = encode(self.tokenizer, pixels_BPP3)
        without_B = [self.transformer.config.null_class] * len(labels)
        given_BL, without_BL = (
            log_probabilities(self.tokenizer, self.transformer, tokens, each) for each in (labels, without_B)
        )
        gain_B: NDArray[np.float64] = (given_BL - without_BL).sum(1).double().cpu().numpy()
        return gain_B


def open_classifier(name: str, model: Model, note: Callable[[str], None] = lambda line: None) -> Confidence:
    """Return the classifier that `--classifier` names: "self" is the model, for the others see `Classifier`.

    Raises:
        UsageError: there is no such classifier.
        CheckpointError: its weights are not available, or cannot be used.
    """
    return SelfClassifier(model) if name == "self" else Classifier(name, model.classes, model.device, note)


def check_decision(decide_at: int | None, best_of: float, scales: int) -> None:
    """Raise UsageError if the candidates cannot be judged after a scale, the coarsest being 1; None is off."""
    if best_of < 1:
        raise UsageError(f"--best-of must be 1 or more (got {best_of:g})")
    if decide_at is None:
        return
    if best_of <= 1:
        raise UsageError("--decide-at needs --best-of: it says after which scale the best of several are chosen")
    if not 2 <= decide_at < scales:
        raise UsageError(f"--decide-at must be a scale between the first and the last of {scales} (got {decide_at})")


def check_one_by_one(sampler: BatchSampler) -> None:
    """Raise UsageError if candidates that are judged early would come out otherwise than in the sampler's batches."""
    if sampler.batch_size > 1:
        raise UsageError(
            "--decide-at samples candidates one by one, and in 16 bits on a GPU images depend on the batch; "
            "use --batch-size 1 or --dtype fp32"
        )


Candidate = tuple[SampleRequest, Pixels, Iterator[Pixels]]
"""A request, the pixels that the classifier sees, and an iterator that yields the finished image."""


def best_candidates(
    sampler: BatchSampler,
    classifier: Confidence,
    candidates: Iterable[SampleRequest],
    kept: int,
    decide_at: int | None = None,
) -> list[tuple[SampleRequest, Iterator[Pixels]]]:
    """Return the `kept` candidates of highest confidence, in their order, each with an iterator that yields its image.

    Among equals the first are kept. Memory holds no more images than are kept.

    Args:
        sampler: samples the candidates.
        classifier: judges them.
        candidates: all of one class.
        kept: how many to keep.
        decide_at: scale after which they are judged, the coarsest being 1; only those kept are then sampled to the end,
            when their images are taken. None judges finished images.
    """
    best: list[tuple[float, int, Candidate]] = []
    judged = enumerate(_finished(sampler, candidates) if decide_at is None else _begun(sampler, candidates, decide_at))
    while part := list(islice(judged, CLASSIFIER_BATCH if decide_at is None else 1)):  # each candidate has a cache
        pixels_BPP3 = np.stack([pixels for _, (_, pixels, _) in part])
        confidence_B = classifier.confidence(pixels_BPP3, [request.label for _, (request, _, _) in part])
        scored = [(float(sure), -number, one) for sure, (number, one) in zip(confidence_B, part, strict=True)]
        best = nlargest(kept, best + scored, key=lambda candidate: candidate[:2])
    return [(request, image) for _, _, (request, _, image) in sorted(best, key=lambda candidate: -candidate[1])]


def _finished(sampler: BatchSampler, requests: Iterable[SampleRequest]) -> Iterator[Candidate]:
    for request, pixels in sampler.images(requests):
        own = pixels.copy()  # a view would keep its whole batch in memory
        yield request, own, iter([own])


def _begun(sampler: BatchSampler, requests: Iterable[SampleRequest], scale: int) -> Iterator[Candidate]:
    last = len(sampler.transformer.config.sides)
    for request in requests:
        frames = sampler.growth(request, (scale, last))
        yield request, next(frames), frames


class RejectionSampler:
    """Samples each class's candidates and returns the best of them."""

    def __init__(
        self,
        sampler: BatchSampler,
        classifier: Confidence,
        kept: int,
        group: ProcessGroup,
        decide_at: int | None = None,
    ) -> None:
        """Prepare to sample and judge.

        Args:
            sampler: samples the candidates.
            classifier: judges them.
            kept: how many images of each class are kept.
            group: the ranks that share the work.
            decide_at: after which scale candidates are judged, the coarsest being 1; None after the last.

        Raises:
            UsageError: candidates would be judged early, and are sampled in batches.
        """
        if decide_at is not None:
            check_one_by_one(sampler)
        self.sampler, self.classifier, self.kept, self.group = sampler, classifier, kept, group
        self.decide_at = decide_at
        self._images: dict[SampleRequest, Iterator[Pixels]] = {}

    def select(self, classes: Iterable[list[SampleRequest]]) -> Iterator[list[SampleRequest]]:
        """Yield which of each class's candidates are kept.

        Several ranks judge a class each at once; the kept images are then sampled once more by whichever rank
        writes them, so all ranks must call this and exhaust it. One rank goes class by class and samples once.

        Raises:
            UsageError: candidates are not all of one class, or would not come out the same a second time.
        """
        if self.group.world_size == 1:
            for candidates in classes:
                self._images = dict(self._best(candidates))
                yield list(self._images)
            return
        if self.sampler.batch_size > 1:
            raise UsageError(
                "--best-of with several processes needs images that do not depend on the batch; "
                "use one process, or --dtype fp32"
            )
        mine = [[request for request, _ in self._best(candidates)] for candidates in self.group.shard(classes)]
        shares = self.group.broadcast(self.group.gather(mine))
        yield from filter(None, chain.from_iterable(zip_longest(*shares)))

    def images(self, requests: Iterable[SampleRequest]) -> Iterator[tuple[SampleRequest, Pixels]]:
        """Yield kept images: finished where this rank has them, sampled again otherwise."""
        for request in requests:
            if request in self._images:
                yield request, next(self._images.pop(request))
            else:
                yield from self.sampler.images([request])

    def _best(self, candidates: list[SampleRequest]) -> list[tuple[SampleRequest, Iterator[Pixels]]]:
        ids = {request.provenance.class_id for request in candidates}
        if None in ids or len(ids) > 1:
            raise UsageError(
                "--best-of cannot be used with --class none or random: a classifier needs a class to judge"
            )
        return best_candidates(self.sampler, self.classifier, candidates, self.kept, self.decide_at)
