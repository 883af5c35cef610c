"""The mathematics of the metrics, by torch-fidelity's own functions where possible.

Shapes: P images, N features, S splits of the inception score, V classes of the network.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from varcli.errors import InputError
from varcli.evaluation.metrics import KID_SUBSET_SIZE, KID_SUBSETS, PRC_NEIGHBORS, SPLIT_SEED
from varcli.evaluation.statistics import SplitSums, Statistics

ENOUGH_FOR_A_LINE = 1000
"""Images below which FID∞ is not estimated: the line would be fitted to noise."""

LARGE_TABLE = 10_000
"""Number of images above which not all distances are held in memory at once."""


class Gaussian(Protocol):
    """Mean and covariance of features: one side of a Fréchet distance."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """(N,)."""

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(N, N)."""


class Target(Gaussian, Protocol):
    """What images are measured against."""

    @property
    def name(self) -> str:
        """Its name in errors."""

    @property
    def pool(self) -> Tensor | NDArray[np.float32] | None:
        """Features of its images (P, N), for KID, precision and recall."""

    @property
    def spatial(self) -> Gaussian | None:
        """Moments of its spatial features, for sFID."""

    @property
    def agreement(self) -> tuple[float, float] | None:
        """Class agreement of its images, top-1 and top-5; None where it is not known."""


def table(reference: Target | None) -> Tensor:
    """The features of a reference's images (P, N), which `metrics.check` made sure are there."""
    assert reference is not None and reference.pool is not None
    return torch.as_tensor(reference.pool)


# --- Fréchet distance ------------------------------------------------------------------------------


def frechet_distance(given: Gaussian, reference: Gaussian) -> float:
    """Return the Fréchet distance of two Gaussians, FID where they are of Inception's features.

    Raises:
        InputError: the distance is not finite.
    """
    sides = [{"mu": side.mean, "sigma": side.covariance} for side in (given, reference)]
    (distance,) = fid_statistics_to_metric(*sides, verbose=False).values()
    return _finite(distance)


def frechet_infinity(statistics: Statistics, reference: Gaussian) -> float:
    """Estimate FID of infinitely many images.

    A line through FID against 1/n, by least squares, at a quarter, a half and all of the images: its value
    at 0. With fewer images than features that is far too low.

    Source: Chong and Forsyth 2020, "Effectively Unbiased FID and Inception Score and where to find them",
    section 4.
    Differs: FID of a part is the mean over all four quarters or both halves, which is much less noisy.
    """
    root_NN = _root(reference.covariance)
    inverses, distances = [], []
    for size in NESTED:
        parts = [statistics.moments(quarters) for quarters in size]
        inverses.append(np.mean([1 / part.count for part in parts]))
        distances.append(np.mean([_distance_by_root(part, reference.mean, root_NN) for part in parts]))
    _, infinity = np.polyfit(inverses, distances, deg=1)
    return _finite(float(infinity))


NESTED = (((0,), (1,), (2,), (3,)), ((0, 1), (2, 3)), ((0, 1, 2, 3),))
"""Quarters of which FID is computed: each alone, in pairs, and all together."""


def _root(covariance_NN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the symmetric square root of a covariance; what rounding made negative counts as 0."""
    values_N, vectors_NN = np.linalg.eigh(covariance_NN)
    return (vectors_NN * np.sqrt(values_N.clip(min=0))) @ vectors_NN.T


def _distance_by_root(given: Gaussian, mean_N: NDArray[np.float64], root_NN: NDArray[np.float64]) -> float:
    """Return the Fréchet distance to a Gaussian of this mean and this root of its covariance.

    The product of both covariances has the eigenvalues of root · covariance · root, which is symmetric:
    a tenth of the work.
    """
    values_N = np.linalg.eigvalsh(root_NN @ given.covariance @ root_NN)
    traces = np.trace(given.covariance) + np.square(root_NN).sum()
    return float(np.square(given.mean - mean_N).sum() + traces - 2 * np.sqrt(values_N.clip(min=0)).sum())


def _finite(distance: float) -> float:
    if not np.isfinite(distance):
        raise InputError(f"the Fréchet distance is {distance}: the reference's statistics cannot be those of images")
    return distance


# --- the others ------------------------------------------------------------------------------------


def inception_score(sums: SplitSums) -> tuple[float, float]:
    """Return mean and standard deviation over splits of exp of the mean KL divergence of p from the split's mean.

    Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 4.
    """
    mean_SV = sums.chance_SV / sums.count_S[:, None]
    entropy_S = -torch.xlogy(mean_SV, mean_SV).sum(1)
    score_S = (sums.certainty_S / sums.count_S + entropy_S).exp()
    return float(score_S.mean()), float(score_S.std(correction=0))


def kernel_distance(pool_PN: Tensor, reference_PN: Tensor, subset_size: int = KID_SUBSET_SIZE) -> tuple[float, float]:
    """Return mean and standard deviation over random subsets of the squared kernel distance, KID.

    Source: Bińkowski et al. 2018, "Demystifying MMD GANs", section 3.
    """
    settings = {"kid_subsets": KID_SUBSETS, "kid_subset_size": subset_size, "rng_seed": SPLIT_SEED, "verbose": False}
    mean, deviation = kid_features_to_metric(pool_PN, reference_PN, **settings).values()
    return mean, deviation


def precision_recall(pool_PN: Tensor, reference_PN: Tensor) -> tuple[float, float]:
    """Return the share of images among the reference's neighbours, and of the reference among theirs.

    Source: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric", section 3; on Inception's
    features, as ADM measures them, and not on VGG16's.
    """
    large = max(len(pool_PN), len(reference_PN)) > LARGE_TABLE
    settings = {"prc_neighborhood": PRC_NEIGHBORS, "save_cpu_ram": large, "verbose": False}
    precision, recall, _ = prc_features_to_metric(pool_PN, reference_PN, **settings).values()
    return precision, recall
