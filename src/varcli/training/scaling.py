"""Scaling laws: how a transformer's loss falls with its size, its data and its compute (paper, section 4.2).

L(N, D) = E + A / N^α + B / D^β for N parameters and D training tokens (Hoffmann et al. 2022), and the paper's own form
(β X)^α for one quantity X alone.

Shapes: R runs, G pairs of exponents tried, T terms of the law.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from varcli.config import TransformerConfig
from varcli.errors import InputError

Array = NDArray[np.float64]

HUBER = 1e-3
"""Threshold of the Huber loss of log residuals (Hoffmann et al. 2022)."""
EXPONENTS = (0.01, 3.0)
"""Range of the exponents."""
GRID, ZOOMS, REWEIGHTINGS = 25, 8, 12
"""Exponents tried along each axis, times the search narrows, and steps of iterated least squares."""
NEAR_GRID, NEAR_ZOOMS, NEAR_REACH = 9, 4, 0.7
"""The same around a known law, and the reach of the search in the logarithm of the exponents."""
LARGEST_LOG_BETA = 700.0
"""Of the paper's form; a float64 holds no larger β."""
DRAWS = 200
"""Bootstrap samples of the runs per interval."""
INTERVAL = (2.5, 97.5)
"""Percentiles."""

PAPER = {
    "parameters": {
        "loss_last": (2.0, -0.23),
        "loss": (2.5, -0.20),
        "error_last": (4.9e2, -0.016),
        "error": (6.5e2, -0.010),
    },
    "compute": {
        "loss_last": (2.2e-5, -0.13),
        "loss": (1.5e-5, -0.16),
        "error_last": (8.1e-2, -0.0067),
        "error": (4.4e-2, -0.011),
    },
}
"""β and α of the paper's (β X)^α; X in billions of parameters, or in PFlops of training."""

FIGURES = ("loss", "loss_last", "error", "error_last")
"""Cross-entropy in nats, and the share of tokens not predicted, over all tokens and over the last scale's."""


# --- size and compute of a run ---------------------------------------------------------------------


def block_parameters(config: TransformerConfig) -> int:
    """Parameters of the blocks alone, which is what the paper counts: 73 728 d³ at width 64 d."""
    return 18 * config.depth * config.width**2


def all_parameters(config: TransformerConfig) -> int:
    """All parameters: blocks with their biases, embeddings of classes, positions and levels, and the head."""
    width, codes = config.width, config.codebook_size
    modulation = 6 * width * (width + 1)
    block = 4 * width**2 + 3 * width + width // 64 + 8 * width**2 + 5 * width
    block += 6 * width if config.shared_adaln else modulation
    shared = modulation if config.shared_adaln else 0
    tables = (config.class_count + 1 + len(config.sides) + config.length + 1) * width
    return (
        config.depth * block
        + shared
        + tables
        + (config.codebook_width + 1) * width
        + 2 * width * (width + 1)
        + (width + 1) * codes
    )


def image_flops(config: TransformerConfig) -> float:
    """Operations of one image's forward and backward pass: 6 per weight and token, and those of attention."""
    length, width = config.length, config.width
    per_token = 12 * config.depth * width**2 + config.codebook_width * width + width * config.codebook_size
    once = config.depth * 6 * width**2 + 2 * width**2  # the modulations, whose input is the class
    return 6.0 * (length * per_token + once) + 3.0 * 4 * config.depth * length**2 * width


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A finished run, as a law sees it."""

    name: str
    config: TransformerConfig
    classes: str = ""
    """The class table, as its checkpoint has it."""
    images_seen: int
    images: int | None
    """Different training images, None where the run does not say."""
    figures: dict[str, float]
    """The FIGURES, on held-out images."""

    @property
    def tokens(self) -> float:
        """D, the tokens it was trained on, counting repeated ones."""
        return float(self.images_seen * self.config.length)

    @property
    def pflops(self) -> float:
        """C, the operations of its training in 10^15."""
        return image_flops(self.config) * self.images_seen / 1e15


# --- L(N, D) ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class JointLaw:
    """L(N, D) = E + A / N^α + B / D^β."""

    E: float
    A: float
    """0, like α, if the loss does not fall with N."""
    alpha: float
    B: float
    """0, like β, if the loss does not fall with D, or the runs have too few amounts of data to tell."""
    beta: float

    def predict(self, parameters: Array | float, tokens: Array | float) -> Array:
        """The loss for N parameters and D tokens."""
        return np.asarray(
            self.E + self.A / np.asarray(parameters) ** self.alpha + self.B / np.asarray(tokens) ** self.beta
        )


def fit_joint(
    parameters: Sequence[float] | Array,
    tokens: Sequence[float] | Array,
    loss: Sequence[float] | Array,
    near: JointLaw | None = None,
) -> JointLaw:
    """Fit L(N, D), E jointly with the rest, by variable projection.

    For given exponents the law is linear in E, A and B, which iterated least squares find for a Huber loss of the log
    residuals; the exponents are searched for on a grid that narrows.

    Args:
        parameters: N of each run.
        tokens: D of each run.
        loss: loss or error of each run, in nats or as a share.
        near: a law of similar runs, around which to search; None searches everywhere.

    Raises:
        InputError: there are fewer than three sizes of models, or fewer runs than the law has unknowns.
    """
    n_R, d_R, loss_R = (np.asarray(values, np.float64) for values in (parameters, tokens, loss))
    with_data = len(set(d_R)) >= 3
    unknowns = 5 if with_data else 3
    if len(set(n_R)) < 3:
        raise InputError(f"a law needs models of at least three sizes (got {len(set(n_R))})")
    if len(loss_R) < unknowns:
        raise InputError(f"a law of {unknowns} unknowns needs at least {unknowns} runs (got {len(loss_R)})")
    # In units of the geometric mean all terms are of one size, which keeps the equations well conditioned.
    n_unit, d_unit = np.exp(np.log(n_R).mean()), np.exp(np.log(d_R).mean())
    low, high = np.log(EXPONENTS)
    center, reach, grid, zooms = np.full(2, (low + high) / 2), np.full(2, (high - low) / 2), GRID, ZOOMS
    if near is not None:
        exponents = np.array([near.alpha, near.beta])
        known = exponents > 0
        center = np.where(known, np.log(np.maximum(exponents, EXPONENTS[0])), center)
        reach, grid, zooms = np.where(known, NEAR_REACH, reach), NEAR_GRID, NEAR_ZOOMS
    best: tuple[float, Array, Array] = (math.inf, np.zeros(2), np.zeros(3))
    for _ in range(zooms):
        axis = np.linspace(-1, 1, grid)
        alpha_G, beta_G = (np.exp(np.clip(center[i] + reach[i] * axis, low, high)) for i in (0, 1))
        pairs_G2 = np.stack(np.meshgrid(alpha_G, beta_G if with_data else beta_G[:1], indexing="ij"), -1).reshape(-1, 2)
        terms_GRT = np.stack(
            [
                np.ones((len(pairs_G2), len(n_R))),
                (n_R / n_unit) ** -pairs_G2[:, :1],
                (d_R / d_unit) ** -pairs_G2[:, 1:],
            ][: 3 if with_data else 2],
            axis=-1,
        )
        cost_G, coefficients_GT = linear_fits(terms_GRT, loss_R)
        chosen = int(cost_G.argmin())
        if cost_G[chosen] < best[0]:
            full = np.zeros(3)
            full[: coefficients_GT.shape[1]] = coefficients_GT[chosen]
            best = (float(cost_G[chosen]), pairs_G2[chosen], full)
        center, reach = np.log(best[1]) if math.isfinite(best[0]) else center, reach / 3
    _, (alpha, beta), (floor, a, b) = best
    return JointLaw(
        E=float(floor),
        A=float(a * n_unit**alpha),
        alpha=float(alpha) if a else 0.0,
        B=float(b * d_unit**beta),
        beta=float(beta) if b else 0.0,
    )


def linear_fits(terms_GRT: Array, loss_R: Array) -> tuple[Array, Array]:
    """Return for each pair of exponents the Huber loss of the log residuals, and the coefficients, none negative.

    Where a term would be negative, those are left out, their coefficient being 0, without which the rest fits best.
    """
    cost_G, coefficients_GT = _reweighted(terms_GRT, loss_R)
    negative_G = ~np.isfinite(cost_G)
    terms = range(terms_GRT.shape[-1])
    for kept in chain.from_iterable(combinations(terms, count) for count in terms[1:]):
        part_cost_G, part_GT = _reweighted(terms_GRT[negative_G][..., kept], loss_R)
        padded_GT = np.zeros((len(part_GT), len(terms)))
        padded_GT[:, kept] = part_GT
        better_G = part_cost_G < cost_G[negative_G]
        chosen = np.flatnonzero(negative_G)[better_G]
        cost_G[chosen], coefficients_GT[chosen] = part_cost_G[better_G], padded_GT[better_G]
    return cost_G, coefficients_GT


def _reweighted(terms_GRT: Array, loss_R: Array) -> tuple[Array, Array]:
    """Least squares of relative residuals, reweighted to a Huber loss; infinite cost where a term is negative."""
    weight_GR = np.ones(terms_GRT.shape[:2])
    for _ in range(REWEIGHTINGS):
        scaled_GRT = terms_GRT * (weight_GR / loss_R)[..., None]
        square_GTT = np.einsum("grt,gru->gtu", scaled_GRT, scaled_GRT)
        square_GTT += 1e-12 * np.trace(square_GTT, axis1=1, axis2=2)[:, None, None] * np.eye(square_GTT.shape[1])
        right_GT = np.einsum("grt,gr->gt", scaled_GRT, weight_GR)
        coefficients_GT = np.linalg.solve(square_GTT, right_GT[..., None])[..., 0]
        predicted_GR = np.einsum("grt,gt->gr", terms_GRT, coefficients_GT)
        residual_GR = np.log(np.maximum(predicted_GR, 1e-300) / loss_R)
        weight_GR = np.sqrt(np.minimum(1, HUBER / np.maximum(np.abs(residual_GR), 1e-300)))
    size_GR = np.abs(residual_GR)
    huber_GR = np.where(size_GR < HUBER, size_GR**2 / 2, HUBER * (size_GR - HUBER / 2))
    allowed_G = (coefficients_GT >= 0).all(1) & (predicted_GR > 0).all(1)
    return np.where(allowed_G, huber_GR.sum(1), math.inf), coefficients_GT


def intervals(
    parameters: Sequence[float], tokens: Sequence[float], loss: Sequence[float]
) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of E, A, α, B and β by bootstrap over runs; samples that fit no law are redrawn."""
    n_R, d_R, loss_R = (np.asarray(values, np.float64) for values in (parameters, tokens, loss))
    random = np.random.default_rng(0)
    whole = fit_joint(n_R, d_R, loss_R)
    found: list[JointLaw] = []
    for _ in range(20 * DRAWS):
        rows = random.integers(len(loss_R), size=len(loss_R))
        enough = len(set(n_R[rows])) >= 3 and (len(set(d_R[rows])) >= 3) == (len(set(d_R)) >= 3)
        if enough:
            found.append(fit_joint(n_R[rows], d_R[rows], loss_R[rows], near=whole))
        if len(found) == DRAWS:
            break
    names = ("E", "A", "alpha", "B", "beta")
    ends = {name: np.percentile([getattr(law, name) for law in found], INTERVAL) for name in names} if found else {}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


# --- the paper's form ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerLaw:
    """floor + (β X)^α."""

    beta: float
    alpha: float
    floor: float
    correlation: float
    """Pearson's, of log X and the log of what lies above the floor."""

    def predict(self, x: Array | float) -> Array:
        """The figure at X."""
        return np.asarray(self.floor + (self.beta * np.asarray(x)) ** self.alpha)


def fit_power(x: Sequence[float], figure: Sequence[float], floor: float = 0.0) -> PowerLaw:
    """Fit the paper's (β X)^α by least squares in logarithms.

    Args:
        x: parameters in billions, or PFlops, of each run.
        figure: loss or error of each run.
        floor: taken off before: the irreducible loss.

    Raises:
        InputError: there are fewer than two different X, a figure is not above the floor, or all are nearly the same.
    """
    x_R, above_R = np.asarray(x, np.float64), np.asarray(figure, np.float64) - floor
    if len(set(x_R)) < 2:
        raise InputError("a power law needs at least two runs that differ in size or compute (got one)")
    if (above_R <= 0).any():
        raise InputError(f"a run lies below the irreducible part of {floor:.3f}: train more runs")
    slope, offset = np.polyfit(np.log(x_R), np.log(above_R), 1)
    if abs(offset) >= LARGEST_LOG_BETA * abs(slope):
        raise InputError("a power law needs figures that differ (those of the runs are nearly the same)")
    correlation = float(np.corrcoef(np.log(x_R), np.log(above_R))[0, 1])
    return PowerLaw(beta=math.exp(offset / slope), alpha=float(slope), floor=floor, correlation=correlation)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (compute, loss) that no cheaper point beats, in order of compute."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best
