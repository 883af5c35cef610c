"""Sums over images, from which the figures are computed, streamed in float64: no table of all features is needed.

An image is known by its index, its position in the order of the images' names. Its split of the inception score and its
quarter follow from the index alone, so that no figure depends on the order in which images come.

Shapes: B images of a batch, P images of the plan, N features of the network's last pooling, V its classes,
F spatial features, S splits of the inception score, Q quarters, C classes of the checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varcli.errors import CheckpointError, InputError
from varcli.evaluation.metrics import METRICS, SPLIT_SEED, SPLITS, needed_sums

QUARTERS = 4
"""Random parts of the images; FID of one, two and all of them shows how it depends on the number of images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureShape:
    """Numbers of features of an extractor."""

    pool: int
    """N, of its last pooling or class token."""
    classes: int = 0
    """V, classes it scores; 0 if it scores none."""
    imagenet: bool = False
    """Whether these are ImageNet's 1000, in their order."""
    spatial: int = 0
    """F, spatial features; 0 if it has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalPlan:
    """What to measure, known before the first image."""

    count: int
    """Images in all; their indices are 0 to count - 1."""
    metrics: tuple[str, ...] = ("fid", "is")
    """Some of METRICS."""
    classes: int = 0
    """Size of the class table for the spreads, 0 for none."""
    scored: tuple[int, ...] = ()
    """The network's class for each class of that table; for class agreement alone."""

    def __post_init__(self) -> None:
        """Raise InputError if there are fewer images than a metric of sums needs."""
        assert set(self.metrics) <= set(METRICS)
        for name in self.metrics:
            least = METRICS[name].least if "classes" in METRICS[name].needs else 2
            if self.count < least:
                raise InputError(f"--{name} needs at least {least} images (got {self.count})")

    @property
    def needs(self) -> frozenset[str]:
        """The sums that the metrics are computed from."""
        return needed_sums(self.metrics)

    @property
    def keeps_table(self) -> bool:
        """Whether a metric needs all features at once."""
        return "table" in self.needs


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and covariance of features: one side of a Fréchet distance."""

    count: int
    """Images they are of."""
    mean: NDArray[np.float64]
    """(N,)."""
    covariance: NDArray[np.float64]
    """(N, N), a sample's: divided by count - 1."""


@dataclass(frozen=True, slots=True)
class SplitSums:
    """What the inception score needs of each split."""

    count_S: Tensor
    """Images."""
    chance_SV: Tensor
    """Sum of the images' class probabilities p."""
    certainty_S: Tensor
    """Sum of the images' Σ p log p."""


def parts(count: int, number: int) -> Tensor:
    """Return for each index which of `number` random parts of equal size it falls in.

    Source: torch-fidelity's `isc_features_to_metric`, which shuffles and splits like this.
    """
    order = np.random.RandomState(SPLIT_SEED).permutation(count)
    begins = [part * count // number for part in range(number)]
    found = np.empty(count, np.int64)
    found[order] = np.searchsorted(begins, np.arange(count), side="right") - 1
    return torch.from_numpy(found)


class Statistics:
    """The sums of the images added so far."""

    def __init__(self, plan: EvalPlan, shape: FeatureShape) -> None:
        """Begin with no image; `shape` is the extractor's."""
        self.plan, self.shape = plan, shape
        self._split = parts(plan.count, SPLITS)
        self._quarter = parts(plan.count, QUARTERS)
        self._sums = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in _sums(plan, shape).items()}

    @property
    def present(self) -> Tensor:
        """Which indices have been added, bool (P,)."""
        return self._sums["present_P"]

    @property
    def count(self) -> int:
        """Number of images added."""
        return int(self.present.sum())

    def add(
        self,
        indices: Sequence[int],
        labels: Sequence[int],
        pool_BN: Tensor,
        logits_BV: Tensor,
        spatial_BF: Tensor | None = None,
    ) -> None:
        """Add images; some hundred at a time are fastest.

        Args:
            indices: of the images, none of which was added before.
            labels: index in the class table, -1 where no class is known.
            pool_BN: their features, on the CPU.
            logits_BV: their class scores without bias, on the CPU.
            spatial_BF: their spatial features, on the CPU, where a metric needs them.

        Raises:
            CheckpointError: the features are not finite, which images cannot cause.
        """
        given = [pool_BN, logits_BV, *([] if spatial_BF is None else [spatial_BF])]
        if not all(tensor.isfinite().all() for tensor in given):
            raise CheckpointError("the extractor's features are not finite; the weights file is probably damaged")
        index_B = torch.as_tensor(indices)
        if "moments" in self.plan.needs:
            self._add_moments(self._quarter[index_B], pool_BN.double())
        if "spatial" in self.plan.needs:
            assert spatial_BF is not None
            self._sums["spatial_F"] += spatial_BF.double().sum(0)
            self._sums["spatial_FF"].addmm_(spatial_BF.double().T, spatial_BF.double())
        if "classes" in self.plan.needs:
            self._add_chances(self._split[index_B], logits_BV.double())
        if "labels" in self.plan.needs:
            self._add_agreement(torch.as_tensor(labels), logits_BV)
        if self.plan.classes:
            self._add_classes(torch.as_tensor(labels), pool_BN.double())
        if self.plan.keeps_table:
            self._sums["pool_PN"][index_B] = pool_BN
        self.present[index_B] = True

    def _add_moments(self, quarter_B: Tensor, pool_BN: Tensor) -> None:
        for quarter in range(QUARTERS):
            part_BN = pool_BN[quarter_B == quarter]
            self._sums["quarter_Q"][quarter] += len(part_BN)
            self._sums["quarter_QN"][quarter] += part_BN.sum(0)
            self._sums["quarter_QNN"][quarter].addmm_(part_BN.T, part_BN)

    def _add_chances(self, split_B: Tensor, logits_BV: Tensor) -> None:
        p_BV, log_p_BV = logits_BV.softmax(1), logits_BV.log_softmax(1)
        self._sums["split_S"].index_add_(0, split_B, torch.ones(len(split_B), dtype=torch.float64))
        self._sums["chance_SV"].index_add_(0, split_B, p_BV)
        self._sums["certainty_S"].index_add_(0, split_B, (p_BV * log_p_BV).sum(1))

    def _add_agreement(self, label_B: Tensor, logits_BV: Tensor) -> None:
        """Count images whose label has the largest score of the plan's classes, and one of the five largest."""
        logits_BC = logits_BV[label_B >= 0][:, list(self.plan.scored)]
        label_B1 = label_B[label_B >= 0][:, None]
        place_B = (logits_BC > logits_BC.gather(1, label_B1)).sum(1)
        counts = [len(place_B), int((place_B < 1).sum()), int((place_B < 5).sum())]
        self._sums["agreement_3"] += torch.tensor(counts, dtype=torch.float64)

    def _add_classes(self, label_B: Tensor, pool_BN: Tensor) -> None:
        label_B, pool_BN = label_B[label_B >= 0], pool_BN[label_B >= 0]
        self._sums["class_C"].index_add_(0, label_B, torch.ones(len(label_B), dtype=torch.float64))
        self._sums["class_CN"].index_add_(0, label_B, pool_BN)
        self._sums["square_C"].index_add_(0, label_B, pool_BN.square().sum(1))

    def moments(self, quarters: Sequence[int] = range(QUARTERS)) -> Moments:
        """Return mean and covariance of the images in some quarters, of all by default; there must be two."""
        chosen = list(quarters)
        count = int(self._sums["quarter_Q"][chosen].sum())
        return _moments(count, self._sums["quarter_QN"][chosen].sum(0), self._sums["quarter_QNN"][chosen].sum(0))

    def spatial_moments(self) -> Moments:
        """Mean and covariance of the spatial features of all images."""
        return _moments(self.count, self._sums["spatial_F"], self._sums["spatial_FF"].clone())

    def agreement(self) -> tuple[float, float]:
        """Shares of the images, top-1 and top-5, whose label the network names among the plan's classes."""
        count, first, five = self._sums["agreement_3"].tolist()
        return first / count, five / count

    def splits(self) -> SplitSums:
        """What the inception score needs."""
        return SplitSums(self._sums["split_S"], self._sums["chance_SV"], self._sums["certainty_S"])

    @property
    def pool(self) -> Tensor:
        """The features of all images in order of index, float32 (P, N); only where the plan keeps them."""
        return self._sums["pool_PN"][self.present]

    def spreads(self) -> dict[int, tuple[int, float]]:
        """Number and spread of the images of each label that has any.

        The spread is the root of the mean squared distance of features to their class's mean.
        """
        count_C, sum_CN, square_C = (self._sums[name] for name in ("class_C", "class_CN", "square_C"))
        variance_C = square_C / count_C - (sum_CN / count_C[:, None]).square().sum(1)
        spread_C = variance_C.clamp_min(0).sqrt()
        labels = count_C.nonzero().flatten().tolist()
        return {label: (int(count_C[label]), float(spread_C[label])) for label in labels}

    def tensors(self) -> dict[str, Tensor]:
        """Return all sums by name, for a file."""
        return dict(self._sums)

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are sums of this plan."""
        return {name: (tuple(sums.shape), sums.dtype) for name, sums in tensors.items()} == _sums(self.plan, self.shape)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore sums that `tensors` returned."""
        assert self.fits(tensors)
        self._sums = {name: sums.clone() for name, sums in tensors.items()}


def _moments(count: int, sum_N: Tensor, square_NN: Tensor) -> Moments:
    """Mean and covariance from sums; `square_NN` is overwritten."""
    mean_N = sum_N / count
    covariance_NN = square_NN.addr_(mean_N, mean_N, alpha=-count).div_(count - 1)
    return Moments(count, mean_N.numpy(), covariance_NN.numpy())


def _sums(plan: EvalPlan, shape: FeatureShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and type of the sums that a plan needs."""
    sizes: dict[str, tuple[int, ...]] = {}
    pool, classes, spatial = shape.pool, shape.classes, shape.spatial
    if "moments" in plan.needs:
        sizes |= {"quarter_Q": (QUARTERS,), "quarter_QN": (QUARTERS, pool), "quarter_QNN": (QUARTERS, pool, pool)}
    if "spatial" in plan.needs:
        sizes |= {"spatial_F": (spatial,), "spatial_FF": (spatial, spatial)}
    if "classes" in plan.needs:
        sizes |= {"split_S": (SPLITS,), "chance_SV": (SPLITS, classes), "certainty_S": (SPLITS,)}
    if "labels" in plan.needs:
        sizes |= {"agreement_3": (3,)}
    if plan.classes:
        sizes |= {"class_C": (plan.classes,), "class_CN": (plan.classes, pool), "square_C": (plan.classes,)}
    table = {"pool_PN": ((plan.count, pool), torch.float32)} if plan.keeps_table else {}
    return {
        "present_P": ((plan.count,), torch.bool),
        **table,
        **{name: (size, torch.float64) for name, size in sizes.items()},
    }
