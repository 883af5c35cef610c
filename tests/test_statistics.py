import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from varcli.errors import CheckpointError, InputError
from varcli.evaluation.distances import inception_score
from varcli.evaluation.metrics import SPLITS
from varcli.evaluation.statistics import QUARTERS, EvalPlan, FeatureShape, Statistics, parts

COUNT, WIDTH, CLASSES = 73, 16, 20
"""As many images as divide neither into splits nor into quarters."""


SHAPE = FeatureShape(pool=WIDTH, classes=CLASSES, spatial=5)


@pytest.fixture
def features():
    """Features and class scores of images, and their classes."""
    noise = torch.Generator().manual_seed(0)
    pool, logits = torch.randn(COUNT, WIDTH, generator=noise) + 2, torch.randn(COUNT, CLASSES, generator=noise) * 3
    return pool, logits, [rank % 4 - 1 for rank in range(COUNT)]


def added(features, order, chunks=1, **plan):
    """Return statistics to which images were added in an order, in so many chunks."""
    pool, logits, rows = features
    statistics = Statistics(EvalPlan(count=COUNT, **plan), SHAPE)
    for ranks in np.array_split(np.array(order), chunks):
        statistics.add(ranks.tolist(), [rows[rank] for rank in ranks], pool[ranks], logits[ranks])
    return statistics


ORDER = np.random.RandomState(1).permutation(COUNT)


# --- laws ------------------------------------------------------------------------------------------


def test_splits_are_torch_fidelitys(features):
    expected = isc_features_to_metric(features[1])
    mean, deviation = inception_score(added(features, ORDER, 6).splits())
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-12)


def test_splits_do_not_depend_on_the_order_images_come_in(features):
    found = [inception_score(added(features, order, 5).splits()) for order in (range(COUNT), ORDER)]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize(("count", "number"), [(73, 10), (73, 4), (40, 4), (10, 10), (3, 4), (2, 4)])
def test_parts_are_of_equal_size_and_not_in_order(count, number):
    found = parts(count, number)
    sizes = torch.bincount(found, minlength=number)
    assert sizes.sum() == count
    assert sizes.max() - sizes.min() <= 1
    assert count < 10 or not torch.equal(found, found.sort().values)


def test_moments_are_numpys(features):
    moments = added(features, ORDER, 7).moments()
    pool = features[0].numpy().astype(np.float64)
    assert moments.count == COUNT
    assert np.allclose(moments.mean, pool.mean(0), rtol=1e-12)
    assert np.allclose(moments.covariance, np.cov(pool, rowvar=False), rtol=1e-10, atol=1e-12)


def test_quarters_are_disjoint_and_make_up_all(features):
    statistics = added(features, ORDER, 3)
    quarters = [statistics.moments([quarter]) for quarter in range(QUARTERS)]
    assert sum(quarter.count for quarter in quarters) == COUNT
    total = sum(quarter.count * quarter.mean for quarter in quarters)
    assert np.allclose(total / COUNT, statistics.moments().mean, rtol=1e-12)
    chosen = parts(COUNT, QUARTERS) >= 2
    assert np.allclose(statistics.moments((2, 3)).mean, features[0][chosen].double().mean(0), rtol=1e-12)


def test_a_classs_spread_is_its_distance_to_its_mean(features):
    pool, _, rows = features
    spreads = added(features, ORDER, 5, classes=4).spreads()
    assert sorted(spreads) == [0, 1, 2]  # the row -1 counts nowhere, row 3 has no image
    for row, (count, spread) in spreads.items():
        own = pool[[rank for rank in range(COUNT) if rows[rank] == row]].double()
        assert count == len(own)
        assert spread == pytest.approx((own - own.mean(0)).square().sum(1).mean().sqrt().item(), rel=1e-10)


def test_a_classs_only_image_has_no_spread(features):
    statistics = Statistics(EvalPlan(count=10, classes=1), SHAPE)
    statistics.add([3], [0], features[0][:1], features[1][:1])
    assert statistics.spreads() == {0: (1, 0.0)}


def test_the_table_is_in_order_of_rank(features):
    assert torch.equal(added(features, ORDER, 4, metrics=("kid",)).pool, features[0])
    assert torch.equal(added(features, ORDER[:9], metrics=("prc",)).pool, features[0][np.sort(ORDER[:9])])


def test_what_is_there_is_known(features):
    statistics = added(features, ORDER[:20], 2)
    assert statistics.count == 20
    assert statistics.present.nonzero().flatten().tolist() == sorted(ORDER[:20])


# --- kept and taken up -----------------------------------------------------------------------------


def test_sums_go_on_from_what_was_kept(features):
    plan = {"metrics": ("fid", "is", "kid"), "classes": 3}
    first = added(features, ORDER[:30], 2, **plan)
    second = Statistics(first.plan, SHAPE)
    assert second.fits(first.tensors())
    second.load(first.tensors())
    for statistics in (first, second):
        rest = ORDER[30:]
        statistics.add(rest.tolist(), [features[2][rank] for rank in rest], features[0][rest], features[1][rest])
    assert first.tensors().keys() == second.tensors().keys()
    for name, sums in first.tensors().items():
        assert torch.equal(sums, second.tensors()[name])
    assert first.count == COUNT


@pytest.mark.parametrize(
    "other", [{"count": 74}, {"metrics": ("fid",)}, {"metrics": ("fid", "is", "kid")}, {"classes": 3}]
)
def test_sums_of_another_plan_do_not_fit(features, other):
    plan = EvalPlan(**{"count": COUNT} | other)
    assert not Statistics(plan, SHAPE).fits(added(features, ORDER).tensors())


def test_what_is_not_asked_for_is_not_kept():
    assert set(Statistics(EvalPlan(count=SPLITS, metrics=("is",)), SHAPE).tensors()) == {
        "present_P",
        "split_S",
        "chance_SV",
        "certainty_S",
    }
    assert Statistics(EvalPlan(count=50_000), SHAPE).tensors()["quarter_QNN"].shape == (QUARTERS, WIDTH, WIDTH)


# --- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_and_not_added(features, value):
    pool, logits, rows = features
    statistics = Statistics(EvalPlan(count=COUNT), SHAPE)
    for part in (pool, logits):
        part[5, 3] = value
        with pytest.raises(CheckpointError, match="features are not finite"):
            statistics.add(list(range(COUNT)), rows, pool, logits)
        part[5, 3] = 0
    assert statistics.count == 0


@pytest.mark.parametrize(("metric", "count"), [("fid", 1), ("is", 9), ("fid", 0)])
def test_fewer_images_than_a_metric_needs_are_refused(metric, count):
    with pytest.raises(InputError, match=rf"--{metric} needs at least \d+ images \(got {count}\)"):
        EvalPlan(count=count, metrics=(metric,))
