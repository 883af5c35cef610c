"""Which of a class's candidates stay."""

from dataclasses import dataclass

import numpy as np
import pytest

import varcli
from support import small
from support.provenances import made
from varcli.distributed import ProcessGroup
from varcli.errors import UsageError
from varcli.pipelines.rejection import CLASSIFIER_BATCH, RejectionSampler, best_candidates, open_classifier
from varcli.pipelines.requests import SampleRequest


class Seeds:
    """Makes images whose pixels are their seeds."""

    def __init__(self, batch_size=1):
        self.batch_size, self.made = batch_size, []

    def images(self, wanted):
        for image in wanted:
            self.made.append(image.seed)
            batch = np.full((8, 2, 2, 3), image.seed, np.uint8)
            yield image, batch[0]


@dataclass
class Sure:
    """Is as sure of an image as it is told."""

    of: list

    def confidence(self, pixels_BPP3, rows):
        assert len(pixels_BPP3) == len(rows) <= CLASSIFIER_BATCH
        return np.array([self.of[pixels[0, 0, 0]] for pixels in pixels_BPP3])


def candidates(count, class_id=207):
    return [SampleRequest(3, seed, made(seed, class_id=class_id)) for seed in range(count)]


def seeds(found):
    return [image.seed for image, _ in found]


def test_the_surest_stay_in_their_order():
    assert seeds(best_candidates(Seeds(), Sure([0.1, 0.9, 0.5, 0.95, 0.2]), candidates(5), 3)) == [1, 2, 3]


def test_of_equally_sure_ones_the_first_stay():
    assert seeds(best_candidates(Seeds(), Sure([0.5] * 5), candidates(5), 2)) == [0, 1]


def test_more_candidates_than_are_looked_at_at_once():
    sure = np.random.RandomState(0).permutation(100) / 100
    wanted = sorted(np.argsort(-sure)[:7])
    found = best_candidates(Seeds(), Sure(sure), candidates(100), 7)
    assert seeds(found) == wanted
    images = [next(image) for _, image in found]
    assert [pixels[0, 0, 0] for pixels in images] == wanted
    assert all(pixels.base is None for pixels in images), "a view keeps its whole batch in memory"


def test_one_process_makes_each_candidate_once():
    sampler = Seeds()
    rejection = RejectionSampler(sampler, Sure([0.1, 0.9, 0.5, 0.8]), 2, ProcessGroup())
    chosen = (image for group in rejection.select([candidates(4), candidates(4)]) for image in group)
    assert seeds(rejection.images(chosen)) == [1, 3, 1, 3]
    assert sampler.made == [0, 1, 2, 3] * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return varcli.load(small.save(tmp_path_factory.mktemp("model") / "small.safetensors"), device="cpu", dtype="fp32")


@pytest.mark.parametrize("scale", [1, 2])
def test_an_image_decided_early_is_the_one_of_its_seed(model, scale):
    """The classifier sees candidates after a scale; the best become what their seeds give, and the others end there."""
    config = model.settings(cfg=3.0, top_k=40)
    sampler, seen, counts = model.sampler(config), [], []
    sampler_growth = sampler.growth

    def counted(request, scales):
        counts.append(0)
        number = len(counts) - 1
        for pixels in sampler_growth(request, scales):
            counts[number] += 1
            yield pixels

    class Likes:
        def confidence(self, pixels_BPP3, rows):
            seen.extend(pixels_BPP3)
            return np.array([[0.1, 0.9, 0.3, 0.8][len(seen) - 1]])

    sampler.growth = counted
    found = best_candidates(sampler, Likes(), candidates(4), 2, decide_at=scale)
    assert counts == [1, 1, 1, 1]
    assert [request.seed for request, _ in found] == [1, 3]
    for request, image in found:
        assert np.array_equal(next(image), next(model.sampler(config).images([request]))[1])
        assert np.array_equal(seen[request.seed], list(sampler_growth(request))[scale - 1])
    assert counts == [1, 2, 1, 2]


def test_early_decisions_are_not_for_batches():
    with pytest.raises(UsageError, match="--decide-at samples candidates one by one"):
        RejectionSampler(Seeds(batch_size=8), Sure([]), 2, ProcessGroup(), decide_at=1)


def test_batches_are_not_made_once_more_by_another_process():
    rejection = RejectionSampler(Seeds(batch_size=8), Sure([]), 2, ProcessGroup(0, 2))
    with pytest.raises(UsageError, match="--best-of with several processes needs images"):
        list(rejection.select([candidates(4)]))


def test_no_class():
    rejection = RejectionSampler(Seeds(), Sure([]), 2, ProcessGroup())
    with pytest.raises(UsageError, match="--best-of cannot be used with --class none or random"):
        list(rejection.select([candidates(4, class_id=None)]))


def test_a_model_judges_its_own_samples(tmp_path):
    """By the nats that the class saves; the image kept is the one that the class explains best."""
    model = varcli.load(small.save(tmp_path / "small.safetensors"), device="cpu", dtype="fp32")
    images = model.sample(207, count=6)
    saved = [model.score(image, None).nats - model.score(image, 207).nats for image in images]
    classifier = open_classifier("self", model)
    found = classifier.confidence(np.stack([image.array for image in images]), [model.classes.label(207)] * 6)
    assert found == pytest.approx(saved, abs=1e-3)
    assert np.std(saved) > 0.01
    wanted = [SampleRequest(model.classes.label(207), image.seed, image.provenance) for image in images]
    kept = best_candidates(model.sampler(model.settings()), classifier, wanted, 1)
    assert seeds(kept) == [int(np.argmax(saved))]
    assert classifier.sha256 == model.sha256
