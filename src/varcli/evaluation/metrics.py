"""The metrics of `var eval`: one row each. No torch here, since the command line is made from them.

To add a metric, add a row: its name, help, what it needs of the statistics, its figures and how they are computed.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from varcli.errors import InputError, UsageError

if TYPE_CHECKING:
    from varcli.evaluation.distances import Target
    from varcli.evaluation.statistics import EvalPlan, FeatureShape, Statistics


@dataclass(frozen=True, slots=True)
class Figure:
    """How a figure is written."""

    title: str
    digits: int
    """After the decimal point."""
    lower_is_better: bool = False


FEATURES: dict[str, dict[str, Figure]] = {
    "inception-v3-compat": {"fid": Figure("FID", 2, lower_is_better=True)},
    "dinov2": {"fd_dinov2": Figure("FD-DINOv2", 2, lower_is_better=True)},
    "efficientnet-lite0": {"fd_efficientnet": Figure("FD-EfficientNet", 3, lower_is_better=True)},
}
"""Feature extractors as `--features` takes them, and the name and form of their Fréchet distance in results.

Their classes, which need torch, are in `extractors`.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A row: everything about a metric."""

    name: str
    """As users type it: the option is `--` and this."""
    help: str
    needs: frozenset[str]
    """Some of "moments", "spatial", "classes", "labels" and "table": the sums it is computed from."""
    figures: Mapping[str, Figure]
    """Its figures by their names in a result."""
    compute: Callable[["Statistics", "Target | None"], dict[str, float]]
    """Its figures of statistics, against a reference."""
    least: int = 2
    """Least number of images."""
    reference: bool = True
    """Whether it is measured against a reference."""
    of_reference: bool = False
    """Whether it is also measured of a reference's own images, where one is named."""
    reconstruction_prefix: str | None = None
    """What its figures' names begin with when a tokenizer's reconstructions are measured; None if they are not."""
    advice: str = "leave --features out"
    """What to do where the feature extractor lacks what it needs."""
    protocol: Callable[[], dict[str, Any]] = dict
    """What else determines its figures."""


def _fid(statistics: "Statistics", reference: "Target | None") -> dict[str, float]:
    from varcli.evaluation import distances

    assert reference is not None
    figures = {"fid": distances.frechet_distance(statistics.moments(), reference)}
    if statistics.count >= distances.ENOUGH_FOR_A_LINE:
        figures["fid_infinity"] = distances.frechet_infinity(statistics, reference)
        figures["fid_bias"] = figures["fid"] - figures["fid_infinity"]
    return figures


def _sfid(statistics: "Statistics", reference: "Target | None") -> dict[str, float]:
    from varcli.evaluation import distances

    assert reference is not None and reference.spatial is not None
    return {"sfid": distances.frechet_distance(statistics.spatial_moments(), reference.spatial)}


def _inception_score(statistics: "Statistics", reference: "Target | None") -> dict[str, float]:
    from varcli.evaluation import distances

    mean, deviation = distances.inception_score(statistics.splits())
    return {"inception_score": mean, "inception_score_std": deviation}


def _kid(statistics: "Statistics", reference: "Target | None") -> dict[str, float]:
    from varcli.evaluation import distances

    mean, deviation = distances.kernel_distance(statistics.pool, distances.table(reference))
    return {"kid": mean, "kid_std": deviation}


def _precision_recall(statistics: "Statistics", reference: "Target | None") -> dict[str, float]:
    from varcli.evaluation import distances

    precision, recall = distances.precision_recall(statistics.pool, distances.table(reference))
    return {"precision": precision, "recall": recall}


def _agreement(statistics: "Statistics", reference: "Target | None") -> dict[str, float]:
    first, five = statistics.agreement()
    figures = {"agreement": first, "agreement_top5": five}
    if reference and reference.agreement:
        figures["agreement_reference"], figures["agreement_reference_top5"] = reference.agreement
    return figures


SPLITS, SPLIT_SEED = 10, 2020
"""Splits of the inception score and the seed of the shuffle before, torch-fidelity's."""

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""Of kernel distances, torch-fidelity's."""

PRC_NEIGHBORS = 3
"""The k of precision and recall, as ADM and the paper have it."""

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="fid",
            help="Fréchet distance of features: FID, or that of --features, such as FD-DINOv2.",
            needs=frozenset({"moments"}),
            figures={name: figure for figures in FEATURES.values() for name, figure in figures.items()},
            compute=_fid,
            reconstruction_prefix="r",
        ),
        Metric(
            name="sfid",
            help="FID of Inception's spatial features, as ADM defines it.",
            needs=frozenset({"spatial"}),
            figures={"sfid": Figure("sFID", 2, lower_is_better=True)},
            compute=_sfid,
            reconstruction_prefix="r",
        ),
        Metric(
            name="is",
            help="Inception score.",
            needs=frozenset({"classes"}),
            figures={"inception_score": Figure("inception score", 2)},
            compute=_inception_score,
            least=SPLITS,
            reference=False,
            protocol=lambda: {"is_splits": SPLITS, "is_shuffle_seed": SPLIT_SEED},
        ),
        Metric(
            name="kid",
            help="Kernel distance of features (KID).",
            needs=frozenset({"table"}),
            figures={"kid": Figure("KID", 5, lower_is_better=True)},
            compute=_kid,
            least=KID_SUBSET_SIZE,
            protocol=lambda: {"kid_subsets": KID_SUBSETS, "kid_subset_size": KID_SUBSET_SIZE},
        ),
        Metric(
            name="prc",
            help="Precision and recall, k = 3 on the features, as ADM does.",
            needs=frozenset({"table"}),
            figures={"precision": Figure("precision", 4), "recall": Figure("recall", 4)},
            compute=_precision_recall,
            least=PRC_NEIGHBORS + 1,
            protocol=lambda: {"prc_k": PRC_NEIGHBORS},
        ),
        Metric(
            name="agreement",
            help="Class agreement: share of images that --features efficientnet-lite0 assigns to their class.",
            needs=frozenset({"labels"}),
            figures={
                "agreement": Figure("class agreement, top-1", 4),
                "agreement_top5": Figure("class agreement, top-5", 4),
                "agreement_reference": Figure("class agreement of the reference, top-1", 4),
                "agreement_reference_top5": Figure("class agreement of the reference, top-5", 4),
            },
            compute=_agreement,
            least=1,
            reference=False,
            of_reference=True,
            reconstruction_prefix="",
            advice="give --features efficientnet-lite0",
        ),
    )
}
"""All metrics, in the order in which they are shown."""


def needed_sums(names: Collection[str]) -> frozenset[str]:
    """The sums that metrics are computed from."""
    return frozenset().union(*(METRICS[name].needs for name in names))


def scores(shape: "FeatureShape") -> bool:
    """Whether an extractor has the classes of the inception score, which are Inception's alone."""
    return shape.classes > 0 and not shape.imagenet


def check_features(names: Collection[str], shape: "FeatureShape") -> None:
    """Check, before anything is downloaded, that an extractor has the features that metrics need.

    Raises:
        UsageError: there is no such metric.
        InputError: the extractor lacks features.
    """
    lacking = {
        **dict.fromkeys(("moments", "table"), not shape.pool),
        "classes": not scores(shape),
        "spatial": not shape.spatial,
        "labels": not shape.imagenet,
    }
    for name in names:
        if name not in METRICS:
            raise UsageError(f"metrics must be some of {', '.join(METRICS)} (got {name})")
        if any(lacking.get(need) for need in METRICS[name].needs):
            raise InputError(f"--{name} needs the features of another network: {METRICS[name].advice}")


def check_reconstructed(names: Collection[str]) -> None:
    """Raise UsageError if one of these metrics is not measured of a tokenizer's reconstructions."""
    others = [f"--{name}" for name in names if METRICS[name].reconstruction_prefix is None]
    if others:
        raise UsageError(
            f"--tokenizer cannot be used with {' or '.join(others)}: it measures FID, PSNR, SSIM and LPIPS"
        )


def check_plan(plan: "EvalPlan", shape: "FeatureShape", reference: "Target | None") -> None:
    """Check, before long work, that a plan's figures can be computed against a reference.

    Raises:
        InputError: there is no reference where one is needed, it lacks statistics or images, its statistics are of
            other features, or images are too few.
    """
    for name in plan.metrics:
        metric = METRICS[name]
        if plan.count < metric.least:
            raise InputError(f"--{name} needs at least {metric.least} images (got {plan.count})")
        if not metric.reference:
            continue
        if reference is None:
            raise InputError(f"--{name} is measured against a reference: give --reference")
        if "spatial" in metric.needs:
            if reference.spatial is None:
                raise InputError(f"the reference {reference.name} has no spatial statistics, which --{name} needs")
            if (size := len(reference.spatial.mean)) != shape.spatial:
                raise InputError(
                    f"the reference {reference.name} has {size} spatial features, and --{name} compares {shape.spatial}"
                )
        if "table" in metric.needs:
            if reference.pool is None:
                raise InputError(f"the reference {reference.name} has statistics alone, and --{name} needs its images")
            if len(reference.pool) < metric.least:
                raise InputError(
                    f"--{name} needs at least {metric.least} reference images ({reference.name} has "
                    f"{len(reference.pool)})"
                )


def check_read(statistics: "Statistics", reference: "Target | None") -> None:
    """Check that the images that could be read are enough, where some could not.

    Raises:
        InputError: they are not.
    """
    if statistics.count == statistics.plan.count:
        return
    check_plan(replace(statistics.plan, count=statistics.count), statistics.shape, reference)
    if "classes" in statistics.plan.needs and not statistics.splits().count_S.all():
        raise InputError(f"only {statistics.count} images could be read: too few for the splits of the inception score")


def compute_figures(statistics: "Statistics", reference: "Target | None") -> dict[str, float]:
    """All figures of a plan's metrics by name, against a reference that passed `check_plan`.

    Raises:
        InputError: one is not finite.
    """
    found: dict[str, float] = {}
    for name, metric in METRICS.items():
        if name in statistics.plan.metrics:
            found |= metric.compute(statistics, reference)
    for name, value in found.items():
        if not math.isfinite(value):
            against = f" or of the reference {reference.name}" if reference else ""
            raise InputError(f"{name} is {value}: it cannot be computed from the features of these images{against}")
    return found


def protocol_of(names: Collection[str]) -> dict[str, Any]:
    """What determines the figures of metrics besides images, reference and network."""
    decided: dict[str, Any] = {}
    for name, metric in METRICS.items():
        if name in names:
            decided |= metric.protocol()
    return decided
