from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch_fidelity import FeatureExtractorInceptionV3, calculate_metrics
from torch_fidelity.metric_fid import fid_statistics_to_metric

from support import extractors as random_inception
from varcli.errors import InputError, UsageError
from varcli.evaluation import distances, metrics
from varcli.evaluation.extractors import EXTRACTORS, DinoV2, EfficientNet, Inception, NoFeatures
from varcli.evaluation.statistics import EvalPlan, FeatureShape, Statistics

ALL = ("fid", "is", "kid", "prc")
SUBSET = 10
FEW = 6
"""Images of each folder in the test of sFID, whose network is slow."""


# --- against torch-fidelity ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of PNGs, the pixels in them, and a file of weights."""
    root = tmp_path_factory.mktemp("images")
    darker = random_inception.images(12, seed=1, side=31) * 0.4
    pixels = random_inception.images(16), darker.astype(np.uint8)
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
def features(folders):
    """Our features of the two folders."""
    _, pixels, weights = folders
    extractor = Inception(weights, torch.device("cpu"))
    return [extractor.features(each) for each in pixels]


@pytest.fixture(scope="module")
def ours(features):
    """Statistics of the first folder, its images taken in disorder, and the second one as a reference."""
    first, second = features
    statistics = Statistics(EvalPlan(count=16, metrics=ALL), Inception.shape)
    order = np.random.RandomState(5).permutation(16)
    for chunk in np.array_split(order, 4):
        statistics.add(chunk.tolist(), [-1] * len(chunk), first.pool_BN[chunk], first.logits_BV[chunk])
    return statistics, reference_of(second.pool_BN)


def reference_of(pool_PN):
    pool = pool_PN.numpy().astype(np.float64)
    return SimpleNamespace(name="reference", mean=pool.mean(0), covariance=np.cov(pool, rowvar=False), pool=pool_PN)


@pytest.mark.slow
def test_fid_is_torch_fidelitys(ours, theirs):
    statistics, reference = ours
    found = distances.frechet_distance(statistics.moments(), reference)
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


@pytest.mark.slow
def test_inception_score_is_torch_fidelitys(ours, theirs):
    mean, deviation = distances.inception_score(ours[0].splits())
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6)


@pytest.mark.slow
def test_kid_is_torch_fidelitys(ours, theirs):
    """To a millionth of the kernel's averages, all above 1, whose difference it is: rounding shows no less there."""
    mean, deviation = distances.kernel_distance(ours[0].pool, ours[1].pool, SUBSET)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-6)


@pytest.mark.slow
def test_precision_and_recall_are_torch_fidelitys(ours, theirs, monkeypatch):
    expected = pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert distances.precision_recall(ours[0].pool, ours[1].pool) == expected
    monkeypatch.setattr(distances, "LARGE_TABLE", 1)
    assert distances.precision_recall(ours[0].pool, ours[1].pool) == expected
    assert 0 < theirs["precision"] < 1
    assert theirs["precision"] != theirs["recall"]


@pytest.mark.slow
def test_sfid_is_the_distance_of_adms_features(folders, features):
    """Against torch-fidelity's own network, and a distance from singular values in numpy."""
    _, pixels, weights = folders
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    ).eval()
    kept = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda block, inputs, output: kept.append(output))
    sides = []
    for each, found in zip(pixels, features, strict=True):
        kept.clear()
        with torch.inference_mode():
            network(torch.from_numpy(each[:FEW]).permute(0, 3, 1, 2))
        spatial = kept[0][:, :7].permute(0, 2, 3, 1).flatten(1)
        assert spatial.shape == (FEW, 2023)
        assert torch.linalg.norm(found.spatial_BF[:FEW] - spatial) < 1e-5 * torch.linalg.norm(spatial)
        statistics = Statistics(EvalPlan(count=FEW, metrics=("sfid",)), Inception.shape)
        some = (each_BF[:FEW] for each_BF in (found.pool_BN, found.logits_BV, found.spatial_BF))
        statistics.add(range(FEW), [-1] * FEW, *some)
        sides.append((statistics, spatial.numpy().astype(np.float64)))
    (statistics, ours), (other, theirs) = sides
    reference = SimpleNamespace(name="reference", spatial=other.spatial_moments())
    # Of so few images the trace of the root of both covariances' product is the nuclear norm of a small matrix.
    centred = [(side - side.mean(0)) / np.sqrt(len(side) - 1) for side in (ours, theirs)]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    traces = sum(np.square(side).sum() for side in centred)
    expected = np.square(ours.mean(0) - theirs.mean(0)).sum() + traces - 2 * root
    assert metrics.compute_figures(statistics, reference)["sfid"] == pytest.approx(expected, rel=1e-4)


# --- the Fréchet distance itself, of fewer features ------------------------------------------------

WIDTH = 12


SHAPE = FeatureShape(pool=WIDTH, classes=1)


def drawn(count, seed, stretch=1.0):
    noise = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, WIDTH, generator=noise) @ mixing * stretch


def statistics_of(pool_PN, names=("fid",)):
    statistics = Statistics(EvalPlan(count=len(pool_PN), metrics=names), SHAPE)
    statistics.add(list(range(len(pool_PN))), [-1] * len(pool_PN), pool_PN, torch.zeros(len(pool_PN), 1))
    return statistics


def test_the_symmetric_form_is_the_same_distance():
    given, reference = statistics_of(drawn(60, 0)).moments(), reference_of(drawn(50, 1, stretch=1.5))
    root = distances._root(reference.covariance)
    assert np.allclose(root @ root, reference.covariance)
    found = distances._distance_by_root(given, reference.mean, root)
    assert found == pytest.approx(distances.frechet_distance(given, reference), rel=1e-9)


def test_fid_infinity_is_nearer_the_truth_than_fid():
    reference, few = reference_of(drawn(100_000, 1)), statistics_of(drawn(100, 3))
    fid = distances.frechet_distance(few.moments(), reference)
    infinity = distances.frechet_infinity(few, reference)
    assert abs(infinity) < 0.3 * fid  # both are of one distribution, at no distance


def test_equal_images_are_at_no_distance():
    pool = drawn(40, 0)
    assert distances.frechet_distance(statistics_of(pool).moments(), reference_of(pool)) == pytest.approx(0, abs=1e-5)
    assert distances.precision_recall(pool, pool) == (1, 1)


def test_fewer_images_than_features_have_a_distance_too():
    given, reference = statistics_of(drawn(9, 0)), reference_of(drawn(5, 1))
    assert distances.frechet_distance(given.moments(), reference) > 0
    assert np.isfinite(distances.frechet_infinity(given, reference))


def test_rounding_below_zero_does_no_harm():
    given, reference = statistics_of(drawn(60, 0)), reference_of(drawn(50, 1))
    least = np.linalg.eigvalsh(reference.covariance)[0]
    reference.covariance -= 1.001 * least * np.eye(WIDTH)
    assert np.isfinite(distances.frechet_distance(given.moments(), reference))
    assert np.isfinite(distances.frechet_infinity(given, reference))


def test_statistics_without_a_distance_are_an_input_error():
    reference = reference_of(drawn(50, 1))
    reference.mean = reference.mean + 1e200
    with pytest.raises(InputError, match="the Fréchet distance is inf"), np.errstate(over="ignore"):
        distances.frechet_distance(statistics_of(drawn(60, 0)).moments(), reference)


def test_the_function_is_torch_fidelitys():
    given, reference = statistics_of(drawn(60, 0)).moments(), reference_of(drawn(50, 1))
    sides = [{"mu": side.mean, "sigma": side.covariance} for side in (given, reference)]
    assert (
        distances.frechet_distance(given, reference)
        == fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    )


# --- all together ----------------------------------------------------------------------------------


def test_figures_are_those_the_plan_names():
    reference = reference_of(drawn(40, 1))
    assert list(metrics.compute_figures(statistics_of(drawn(40, 0), ("prc",)), reference)) == ["precision", "recall"]
    assert list(metrics.compute_figures(statistics_of(drawn(40, 0)), reference)) == ["fid"]
    enough = statistics_of(drawn(distances.ENOUGH_FOR_A_LINE, 0))
    assert list(metrics.compute_figures(enough, reference)) == ["fid", "fid_infinity", "fid_bias"]
    assert list(metrics.compute_figures(statistics_of(drawn(7, 0)), reference)) == ["fid"]


@pytest.mark.parametrize(
    ("wanted", "count", "reference", "message"),
    [
        (("fid",), 50, None, "--fid is measured against a reference: give --reference"),
        (("kid",), 999, (5000, 5000), "--kid needs at least 1000 images (got 999)"),
        (("kid",), 5000, (999, 999), "--kid needs at least 1000 reference images (some has 999)"),
        (("kid",), 5000, None, "--kid is measured against a reference: give --reference"),
        (("prc",), 3, (5000, 5000), "--prc needs at least 4 images (got 3)"),
        (("prc",), 50, (3, 3), "--prc needs at least 4 reference images (some has 3)"),
        (("prc",), 50, (5000, None), "the reference some has statistics alone, and --prc needs its images"),
        (("sfid",), 50, (5000, None), "the reference some has no spatial statistics, which --sfid needs"),
    ],
)
def test_what_cannot_be_measured_is_said_before(wanted, count, reference, message):
    pool = reference and reference[1] and torch.zeros(reference[1], 1)
    target = reference and SimpleNamespace(name="some", pool=pool, spatial=None)
    with pytest.raises(InputError) as refused:
        metrics.check_plan(EvalPlan(count=count, metrics=wanted), Inception.shape, target)
    assert str(refused.value) == message


def test_what_can_be_measured_passes():
    """Nothing is raised."""
    metrics.check_plan(EvalPlan(count=50), Inception.shape, SimpleNamespace(name="some", pool=None))
    metrics.check_plan(EvalPlan(count=50, metrics=("is",)), Inception.shape, None)
    whole = SimpleNamespace(name="some", pool=torch.zeros(1000, 1))
    metrics.check_plan(EvalPlan(count=1000, metrics=ALL), Inception.shape, whole)


@pytest.mark.parametrize(
    ("name", "extractor", "advice"),
    [
        ("is", DinoV2, "leave --features out"),
        ("is", EfficientNet, "leave --features out"),
        ("sfid", DinoV2, "leave --features out"),
        ("agreement", Inception, "give --features efficientnet-lite0"),
    ],
)
def test_features_that_an_extractor_lacks_are_said_before(name, extractor, advice):
    with pytest.raises(InputError, match=f"--{name} needs the features of another network: {advice}"):
        metrics.check_features(("fid", name), extractor.shape)


def test_features_that_an_extractor_has_pass():
    """Nothing is raised."""
    metrics.check_features(("fid", "kid", "prc"), DinoV2.shape)
    metrics.check_features(("fid", "sfid", "is", "kid", "prc"), Inception.shape)
    metrics.check_features(("fid", "kid", "agreement"), EfficientNet.shape)


def test_a_metric_that_does_not_exist_is_named():
    with pytest.raises(UsageError, match=r"metrics must be some of fid, sfid, is, kid, prc, agreement \(got isc\)"):
        metrics.check_features(("fid", "isc"), Inception.shape)


def test_spatial_statistics_of_another_network_are_refused():
    spatial = SimpleNamespace(mean=np.zeros(7))
    with pytest.raises(InputError, match="the reference some has 7 spatial features, and --sfid compares 2023"):
        metrics.check_plan(
            EvalPlan(count=50, metrics=("sfid",)), Inception.shape, SimpleNamespace(name="some", spatial=spatial)
        )


def test_every_extractor_that_has_features_is_listed_with_its_frechet_distance():
    assert EXTRACTORS.keys() - metrics.FEATURES.keys() == {NoFeatures.name}
    for name, figures in metrics.FEATURES.items():
        assert [EXTRACTORS[name].figure] == list(figures)


def test_a_metric_is_one_row(monkeypatch):
    row = metrics.Metric(
        name="largest",
        help="The largest mean of a feature.",
        needs=frozenset({"moments"}),
        figures={"largest": metrics.Figure("largest mean", 3)},
        compute=lambda statistics, reference: {"largest": float(statistics.moments().mean.max())},
        reference=False,
    )
    monkeypatch.setitem(metrics.METRICS, "largest", row)
    pool = drawn(40, 0)
    found = metrics.compute_figures(statistics_of(pool, ("largest",)), None)
    assert found == {"largest": pytest.approx(float(pool.double().mean(0).max()), rel=1e-9)}
