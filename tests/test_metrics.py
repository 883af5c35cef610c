from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import fid_statistics_to_metric

from support import extractors as random_inception
from varcli.errors import InputError
from varcli.evaluation import metrics
from varcli.evaluation.extractors import Inception
from varcli.evaluation.statistics import EvalPlan, Statistics

ALL = ("fid", "is", "kid", "prc")
SUBSET = 10


# --- against torch-fidelity ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of PNGs, the pixels in them, and a file of weights."""
    root = tmp_path_factory.mktemp("images")
    darker = random_inception.images(17, seed=1, side=31) * 0.4
    pixels = random_inception.images(23), darker.astype(np.uint8)
    for name, each in zip("ab", pixels, strict=True):
        random_inception.write(root / name, each)
    return root, pixels, random_inception.save(root / "weights.pth")


@pytest.fixture(scope="module")
def theirs(folders):
    """What torch-fidelity says of the two folders."""
    root, _, weights = folders
    return calculate_metrics(
        input1=str(root / "a"),
        input2=str(root / "b"),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        isc=True,
        fid=True,
        kid=True,
        kid_subset_size=SUBSET,
        prc=True,
        cuda=False,
        save_cpu_ram=True,  # no worker processes
        batch_size=8,
        cache=False,
        verbose=False,
    )


@pytest.fixture(scope="module")
def ours(folders):
    """Statistics of the first folder, its images taken in disorder, and the second one as a reference."""
    _, pixels, weights = folders
    extractor = Inception(weights, torch.device("cpu"))
    first, second = (extractor.features(each) for each in pixels)
    statistics = Statistics(EvalPlan(count=23, metrics=ALL))
    order = np.random.RandomState(5).permutation(23)
    for chunk in np.array_split(order, 4):
        statistics.add(chunk.tolist(), [-1] * len(chunk), first.pool_BN[chunk], first.logits_BV[chunk])
    return statistics, reference_of(second.pool_BN)


def reference_of(pool_PN):
    pool = pool_PN.numpy().astype(np.float64)
    return SimpleNamespace(name="reference", mean=pool.mean(0), covariance=np.cov(pool, rowvar=False), pool=pool_PN)


def test_fid_is_torch_fidelitys(ours, theirs):
    statistics, reference = ours
    found = metrics.frechet_distance(statistics.moments(), reference)
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_inception_score_is_torch_fidelitys(ours, theirs):
    mean, deviation = metrics.inception_score(ours[0].splits())
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6)


def test_kid_is_torch_fidelitys(ours, theirs):
    """To a millionth of the kernel's averages, all above 1, whose difference it is: rounding shows no less there."""
    mean, deviation = metrics.kernel_distance(ours[0].pool, ours[1].pool, SUBSET)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-6)


def test_precision_and_recall_are_torch_fidelitys(ours, theirs, monkeypatch):
    expected = pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert metrics.precision_recall(ours[0].pool, ours[1].pool) == expected
    monkeypatch.setattr(metrics, "LARGE_TABLE", 1)
    assert metrics.precision_recall(ours[0].pool, ours[1].pool) == expected
    assert 0 < theirs["precision"] < 1
    assert theirs["precision"] != theirs["recall"]


# --- the Fréchet distance itself, of fewer features ------------------------------------------------

WIDTH = 12


@pytest.fixture
def narrow(monkeypatch):
    """Let features be few, so that distances are quick."""
    monkeypatch.setattr("varcli.evaluation.statistics.POOL", WIDTH)


def drawn(count, seed, stretch=1.0):
    noise = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, WIDTH, generator=noise) @ mixing * stretch


def statistics_of(pool_PN, names=("fid",)):
    statistics = Statistics(EvalPlan(count=len(pool_PN), metrics=names))
    statistics.add(list(range(len(pool_PN))), [-1] * len(pool_PN), pool_PN, torch.zeros(len(pool_PN), 1))
    return statistics


def test_the_symmetric_form_is_the_same_distance(narrow):
    given, reference = statistics_of(drawn(60, 0)).moments(), reference_of(drawn(50, 1, stretch=1.5))
    root = metrics._root(reference.covariance)
    assert np.allclose(root @ root, reference.covariance)
    found = metrics._distance_by_root(given, reference.mean, root)
    assert found == pytest.approx(metrics.frechet_distance(given, reference), rel=1e-9)


def test_fid_infinity_is_nearer_the_truth_than_fid(narrow):
    reference, few = reference_of(drawn(100_000, 1)), statistics_of(drawn(100, 3))
    fid = metrics.frechet_distance(few.moments(), reference)
    infinity = metrics.frechet_infinity(few, reference)
    assert abs(infinity) < 0.3 * fid  # both are of one distribution, at no distance


def test_equal_images_are_at_no_distance(narrow):
    pool = drawn(40, 0)
    assert metrics.frechet_distance(statistics_of(pool).moments(), reference_of(pool)) == pytest.approx(0, abs=1e-5)
    assert metrics.precision_recall(pool, pool) == (1, 1)


def test_fewer_images_than_features_have_a_distance_too(narrow):
    given, reference = statistics_of(drawn(9, 0)), reference_of(drawn(5, 1))
    assert metrics.frechet_distance(given.moments(), reference) > 0
    assert np.isfinite(metrics.frechet_infinity(given, reference))


def test_rounding_below_zero_does_no_harm(narrow):
    given, reference = statistics_of(drawn(60, 0)), reference_of(drawn(50, 1))
    least = np.linalg.eigvalsh(reference.covariance)[0]
    reference.covariance -= 1.001 * least * np.eye(WIDTH)
    assert np.isfinite(metrics.frechet_distance(given.moments(), reference))
    assert np.isfinite(metrics.frechet_infinity(given, reference))


def test_statistics_without_a_distance_are_an_input_error(narrow):
    reference = reference_of(drawn(50, 1))
    reference.mean = reference.mean + 1e200
    with pytest.raises(InputError, match="reference: a Fréchet distance of inf"), np.errstate(over="ignore"):
        metrics.frechet_distance(statistics_of(drawn(60, 0)).moments(), reference)


def test_the_function_is_torch_fidelitys(narrow):
    given, reference = statistics_of(drawn(60, 0)).moments(), reference_of(drawn(50, 1))
    sides = [{"mu": side.mean, "sigma": side.covariance} for side in (given, reference)]
    assert (
        metrics.frechet_distance(given, reference)
        == fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    )


# --- all together ----------------------------------------------------------------------------------


def test_figures_are_those_the_plan_names(narrow, monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 20)
    reference = reference_of(drawn(40, 1))
    assert list(metrics.figures(statistics_of(drawn(40, 0), ("prc",)), reference)) == ["precision", "recall"]
    assert list(metrics.figures(statistics_of(drawn(40, 0)), reference)) == ["fid"]
    enough = statistics_of(drawn(metrics.ENOUGH_FOR_A_LINE, 0))
    assert list(metrics.figures(enough, reference)) == ["fid", "fid_infinity", "fid_bias"]
    assert list(metrics.figures(statistics_of(drawn(7, 0)), reference)) == ["fid"]


@pytest.mark.parametrize(
    ("wanted", "count", "reference", "message"),
    [
        (("fid",), 50, None, "reference: none; fid is measured against one"),
        (("kid",), 999, (5000, 5000), "images: 999; kid takes 1000 or more"),
        (("kid",), 5000, (999, 999), "reference: some has 999 images; kid takes 1000 or more"),
        (("kid",), 5000, None, "reference: none; kid is measured against one"),
        (("prc",), 3, (5000, 5000), "images: 3; prc takes 4 or more"),
        (("prc",), 50, (3, 3), "reference: some has 3 images; prc takes 4 or more"),
        (("prc",), 50, (5000, None), "reference: some has statistics alone; prc takes its images"),
    ],
)
def test_what_cannot_be_measured_is_said_before(wanted, count, reference, message):
    target = reference and SimpleNamespace(name="some", pool=reference[1] and torch.zeros(reference[1], 1))
    with pytest.raises(InputError) as refused:
        metrics.check(EvalPlan(count=count, metrics=wanted), target)
    assert str(refused.value) == message


def test_what_can_be_measured_passes():
    metrics.check(EvalPlan(count=50), SimpleNamespace(name="some", pool=None))
    metrics.check(EvalPlan(count=50, metrics=("is",)), None)
    metrics.check(EvalPlan(count=1000, metrics=ALL), SimpleNamespace(name="some", pool=torch.zeros(1000, 1)))
