"""Sums over pictures from which all figures follow, streamed in float64, so that no table of features is needed.

A picture is known by its rank, its place in the order of the pictures' names. Which split of the inception
score and which quarter it belongs to follows from its rank alone, so that the figures do not depend on the
order pictures come in.

Shapes: B pictures of a batch, N all pictures of the plan or the pool's features, S splits of the inception
score, Q quarters, V classes of the network, C classes of the checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varcli.errors import InputError

POOL, LOGITS = 2048, 1008
"""Features of the network's last pooling, and its classes."""

SPLITS, SHUFFLE_SEED = 10, 2020
"""Of the inception score, as torch-fidelity has them."""

QUARTERS = 4
"""Random parts of the pictures of equal size: FID of one to four of them tells how it depends on their number."""

METRICS = ("fid", "is", "kid", "prc")
"""By the names users type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be measured, known before the first picture."""

    count: int
    """Pictures in all; their ranks are 0 to count - 1."""
    metrics: tuple[str, ...] = ("fid", "is")
    """Some of METRICS."""
    classes: int = 0
    """Rows of the class table of which the spread is wanted; 0 for none."""

    def __post_init__(self) -> None:
        """Refuse fewer pictures than a metric needs.

        Raises:
            InputError: there are fewer.
        """
        assert set(self.metrics) <= set(METRICS)
        for metric, least in (("fid", 2), ("is", SPLITS)):
            if metric in self.metrics and self.count < least:
                raise InputError(f"pictures: {self.count}; {metric} takes at least {least}")

    @property
    def keeps_table(self) -> bool:
        """Whether a metric needs the features of all pictures at once."""
        return bool({"kid", "prc"} & set(self.metrics))


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and covariance of features, the two sides of a Fréchet distance."""

    count: int
    """Pictures they are of."""
    mean: NDArray[np.float64]
    """(N,)."""
    covariance: NDArray[np.float64]
    """(N, N), of a sample: divided by count - 1."""


def parts(count: int, number: int, seed: int) -> NDArray[np.int64]:
    """Return for each rank which of so many random parts of equal size it belongs to.

    Source: torch-fidelity's `isc_features_to_metric` shuffles and splits like this.
    """
    order = np.random.RandomState(seed).permutation(count)
    bounds = [part * count // number for part in range(1, number)]
    found = np.empty(count, np.int64)
    found[order] = np.searchsorted(bounds, np.arange(count), side="right")
    return found


class Statistics:
    """Sums of what was added so far."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._split = parts(plan.count, SPLITS, SHUFFLE_SEED)
        self._quarter = parts(plan.count, QUARTERS, SHUFFLE_SEED)
        self._sums = {
            name: torch.zeros(shape, dtype=torch.float32 if name == "table" else torch.float64)
            for name, shape in self._shapes().items()
        }

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the sums this plan takes, by name."""
        plan, shapes = self.plan, dict[str, tuple[int, ...]]()
        if "fid" in plan.metrics:
            shapes |= {"count_Q": (QUARTERS,), "sum_QN": (QUARTERS, POOL), "outer_QNN": (QUARTERS, POOL, POOL)}
        if "is" in plan.metrics:
            shapes |= {"splits_S": (SPLITS,), "chance_SV": (SPLITS, LOGITS), "negentropy_S": (SPLITS,)}
        if plan.classes:
            shapes |= {"class_C": (plan.classes,), "class_CN": (plan.classes, POOL), "square_C": (plan.classes,)}
        if plan.keeps_table:
            shapes |= {"table": (plan.count, POOL), "present": (plan.count,)}
        return shapes

    def add(self, ranks: Sequence[int], rows: Sequence[int], pool_BN: Tensor, logits_BV: Tensor) -> None:
        """Take pictures in.

        Args:
            ranks: of each picture; each rank once in all.
            rows: of the class table, -1 where no class is known.
            pool_BN: their pooled features, on the CPU.
            logits_BV: their class scores without bias, on the CPU.
        """
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return all sums by name, for a file."""
        return dict(self._sums)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the sums `tensors` returned."""
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == self._shapes()
        self._sums = {name: tensor.clone() for name, tensor in tensors.items()}

    def moments(self, quarters: Sequence[int] = range(QUARTERS)) -> Moments:
        """Return mean and covariance of the pictures of some quarters, of all by default."""
        raise NotImplementedError
