"""Response surfaces: held-out losses as a function of the mixture, fitted on finished runs.

Weights are (N, K) mixtures, losses (N, M) nats; each target is fitted on its own. Every law is a frozen value with
its parameters as arrays, `fit` and `predict`; which one by name: `fit_law("power", weights, losses)`.

With fewer runs than parameters (a few dozen runs, K of ten) a fit must be told what to believe: that a domain has *no*
effect until the runs show one. The linear laws get a ridge whose strength leave-one-out error chooses, the curved ones
a Gaussian prior of fixed strength on the size of each domain's effect, which hundreds of runs override. So with
nothing to learn from every law predicts the mean.

On the 512 1M-parameter runs of RegMix (17 domains, 13 losses; arXiv 2407.01492) the mean Spearman correlation with held
out runs is, at 1M / 60M / 1B parameters: linear .830 / .829 / .712, log-linear .971 / .968 / .915, mixing law
.972 / .967 / .934, power law .982 / .976 / .946, all fitted in a second or two.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from acodm_env.errors import ConfigError, unknown
from acodm_env.step_stats import Array

HUBER_NATS = 0.02
"""Residual at which the curved laws' loss turns from square to linear (arXiv 2403.16952)."""
_PRIOR = 0.03  # half the penalty on one unit of effect, where a run off by x nats costs x²/0.04, or |x| − 0.01
_LARGEST = 30.0  # exponent: e³⁰ nats is no loss any more, and must not overflow
_USEFUL, _BENT = (-30.0, 15.0), (-5.0, 2.0)  # a and b beyond say nothing more
_ITERATIONS = 500
_FLOOR = 1e-4  # share of "everything else" in the power law's sum: a mixture without any useful domain


class Law(Protocol):
    """A fitted response surface."""

    def predict(self, weights: Array) -> Array:
        """Losses (N, M), nats, at the mixtures (N, K)."""


@dataclass(frozen=True)
class LinearLaw:
    """L_i = b_i + Σ_j c_ij w_j. Blind to diminishing returns: its minimiser is always a corner of the simplex."""

    coefficients: Array
    """(F, M), F features."""
    intercepts: Array
    """(M,)."""

    @classmethod
    def fit(cls, weights: Array, losses: Array) -> Self:
        """Ridge regression; strength by leave-one-out error, per target."""
        return cls(*_ridge(cls.features(weights), losses))

    @staticmethod
    def features(weights: Array) -> Array:
        """(N, F): the weights themselves."""
        return weights

    def predict(self, weights: Array) -> Array:
        """Losses (N, M), nats, at the mixtures (N, K)."""
        losses: Array = self.features(weights) @ self.coefficients + self.intercepts
        return losses


class LogLinearLaw(LinearLaw):
    """L_i = b_i + Σ_j (c_ij w_j + d_ij ln(w_j + 0.001)): linear in its parameters, with diminishing returns."""

    @staticmethod
    def features(weights: Array) -> Array:
        """(N, 2K): weights and their logarithms."""
        return np.hstack([weights, np.log(weights + 1e-3)])


@dataclass(frozen=True)
class MixingLaw:
    """L_i = c_i + k_i·exp(Σ_j t_ij w_j), c_i ≥ 0, k_i > 0 (Data mixing laws, arXiv 2403.16952).

    Since Σ w = 1, k_i is part of t_ij here: e^(ln k_i + Σ t_ij w_j) = e^(Σ (ln k_i + t_ij) w_j). Fitted by L-BFGS on
    the Huber loss (0.02). Deviation: the prior, on the spread of t_i· times the spread of the weights.
    """

    exponents: Array
    """(M, K) ln k_i + t_ij."""
    floors: Array
    """(M,) c_i, nats."""

    @classmethod
    def fit(cls, weights: Array, losses: Array) -> Self:
        """Fit each target from three starts: the floor at 20, 60 and 90 % of the lowest loss, no effect."""
        spread = np.maximum(weights.std(0), 1e-3)  # (K,)

        def cost(parameters: Array, targets: Array) -> tuple[Array, Array]:
            exponents, floors = parameters[:, :-1], np.exp(parameters[:, -1:])  # (P, K), (P, 1)
            curves = np.exp(np.minimum(_mixed(weights, exponents), _LARGEST))  # (P, N)
            values, slopes = _huber(floors + curves - targets)
            effects = (exponents - exponents.mean(1, keepdims=True)) * spread
            pull = effects * spread
            gradients = _unmixed(weights, slopes * curves) + 2 * _PRIOR * (pull - pull.mean(1, keepdims=True))
            floored = floors * slopes.sum(1, keepdims=True)
            return values + _PRIOR * (effects**2).sum(1), np.hstack([gradients, floored])

        lowest, mean = losses.min(0)[:, None], losses.mean(0)[:, None]  # (M, 1)
        starts = []
        for share in (0.2, 0.6, 0.9):
            level = np.repeat(np.log(mean - share * lowest), weights.shape[1], axis=1)
            starts.append(np.hstack([level, np.log(share * lowest)]))
        fitted = _minimise(cost, starts, losses.T)
        return cls(fitted[:, :-1], np.exp(fitted[:, -1]))

    def predict(self, weights: Array) -> Array:
        """Losses (N, M), nats, at the mixtures (N, K)."""
        losses: Array = self.floors + np.exp(np.minimum(weights @ self.exponents.T, _LARGEST))
        return losses


@dataclass(frozen=True)
class PowerLaw:
    """L_i = c_i + e^k_i·(1e-4 + Σ_j e^a_ij w_j)^(−e^b_i), c_i ≥ 0: a scaling law in the *useful* share of the data.

    e^a_ij is how much a token of domain j helps target i. No paper has it; it is the best of these on RegMix's runs.
    The prior is on a_ij, around 0 (all equal: the mixture has no effect), and on b_i, around −1.
    """

    usefulness: Array
    """(M, K) a_ij."""
    scales: Array
    """(M,) k_i."""
    exponents: Array
    """(M,) b_i."""
    floors: Array
    """(M,) c_i, nats."""

    @classmethod
    def fit(cls, weights: Array, losses: Array) -> Self:
        """Fit each target by L-BFGS on the Huber loss (0.02) from two starts: e^b of 0.37 and 1, no effect."""

        def cost(parameters: Array, targets: Array) -> tuple[Array, Array]:
            useful, (scales, exponents, floors) = parameters[:, :-3], parameters[:, -3:].T[:, :, None]  # (P, K), (P, 1)
            helps, powers = np.exp(np.clip(useful, *_USEFUL)), np.exp(np.clip(exponents, *_BENT))
            shares = _FLOOR + _mixed(weights, helps)  # (P, N)
            curves = np.exp(np.minimum(scales - powers * np.log(shares), _LARGEST))
            values, slopes = _huber(np.exp(floors) + curves - targets)
            rises = slopes * curves
            gradients = 2 * _PRIOR * useful - powers * helps * _unmixed(weights, rises / shares)
            bent = -powers * (rises * np.log(shares)).sum(1, keepdims=True) + 2 * _PRIOR * (exponents + 1)
            floored = np.exp(floors) * slopes.sum(1, keepdims=True)
            values = values + _PRIOR * ((useful**2).sum(1) + (exponents[:, 0] + 1) ** 2)
            return values, np.hstack([gradients, rises.sum(1, keepdims=True), bent, floored])

        scale, floor = np.log(losses.std(0) + 0.1), np.log(0.9 * losses.min(0))  # (M,)
        nothing = np.zeros((losses.shape[1], weights.shape[1]))
        starts = [np.column_stack([nothing, scale, np.full_like(scale, b), floor]) for b in (-1.0, 0.0)]
        fitted = _minimise(cost, starts, losses.T)
        useful, exponents = np.clip(fitted[:, :-3], *_USEFUL), np.clip(fitted[:, -2], *_BENT)
        return cls(useful, fitted[:, -3], exponents, np.exp(fitted[:, -1]))

    def predict(self, weights: Array) -> Array:
        """Losses (N, M), nats, at the mixtures (N, K)."""
        share = _FLOOR + weights @ np.exp(self.usefulness.T)  # (N, M)
        losses: Array = self.floors + np.exp(self.scales - np.exp(self.exponents) * np.log(share))
        return losses


@dataclass(frozen=True)
class Trees:
    """One LightGBM regressor per target: RegMix's choice for 512 runs (arXiv 2407.01492); needs the package.

    1000 rounds at a learning rate of 0.01, as RegMix. Deviation: no early stopping, which there reads the test runs.
    A leaf keeps LightGBM's 20 runs at least, so that fewer than 40 runs are never split: it predicts their mean.
    """

    models: Sequence[Any]
    """M boosters."""

    @classmethod
    def fit(cls, weights: Array, losses: Array) -> Self:
        """Fit each target.

        Raises:
            ConfigError: LightGBM is not installed.
        """
        try:
            import lightgbm
        except ImportError as error:
            raise ConfigError(
                "regressor=lightgbm: must be installed; it is an extra of this package; "
                "run pip install 'acodm[lightgbm]' or choose another regressor"
            ) from error
        settings = {"learning_rate": 0.01, "seed": 42, "deterministic": True, "num_threads": 1, "verbosity": -1}
        data = [lightgbm.Dataset(weights, target) for target in losses.T]
        return cls([lightgbm.train({"objective": "regression", **settings}, part, 1000) for part in data])

    def predict(self, weights: Array) -> Array:
        """Losses (N, M), nats, at the mixtures (N, K)."""
        return np.column_stack([model.predict(weights) for model in self.models])


LAWS: dict[str, Callable[[Array, Array], Law]] = {
    "linear": LinearLaw.fit,
    "log-linear": LogLinearLaw.fit,
    "mixing": MixingLaw.fit,
    "power": PowerLaw.fit,
    "lightgbm": Trees.fit,
}


def fit_law(name: str, weights: Array, losses: Array) -> Law:
    """Fit one of `LAWS`.

    Args:
        name: of the law.
        weights: (N, K) mixtures, rows summing to 1.
        losses: (N, M) final losses, positive nats.

    Raises:
        ConfigError: an unknown name, shapes that do not match, or losses that are not finite and positive.
    """
    if name not in LAWS:
        unknown("law", name, LAWS)
    weights, losses = np.asarray(weights, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if weights.ndim != 2 or losses.ndim != 2 or len(weights) != len(losses) or len(losses) < 2:
        raise ConfigError(f"losses={losses.shape}: must be (N, M) for weights (N, K) {weights.shape}, N at least 2")
    if not (np.isfinite(weights).all() and np.isfinite(losses).all() and (losses > 0).all()):
        raise ConfigError("losses: must be finite and positive; a run diverged; leave it out")
    return LAWS[name](weights, losses)


def _ridge(features: Array, losses: Array) -> tuple[Array, Array]:
    """Coefficients (F, M) and intercepts (M,) on standardised features, ridge by exact leave-one-out error."""
    means, spread = features.mean(0), features.std(0)
    scale = np.where(spread > 1e-12, spread, 1.0)  # (F,)
    left, singular, right = np.linalg.svd((features - means) / scale, full_matrices=False)
    centred = losses - losses.mean(0)
    projected = left.T @ centred  # (R, M)
    coefficients = np.zeros((features.shape[1], losses.shape[1]))
    lowest = np.full(losses.shape[1], np.inf)
    for strength in np.logspace(-6, 3, 37) * len(features):  # from none to no effect
        kept = singular**2 / (singular**2 + strength)  # (R,)
        leverage = 1 / len(features) + left**2 @ kept  # (N,)
        residuals = centred - left @ (kept[:, None] * projected)  # (N, M)
        error = ((residuals / np.maximum(1 - leverage, 1e-6)[:, None]) ** 2).mean(0)  # (M,)
        inverse = kept / np.maximum(singular, 1e-12)
        better = error < lowest
        coefficients[:, better] = (right.T @ (inverse[:, None] * projected))[:, better]
        lowest = np.minimum(error, lowest)
    coefficients /= scale[:, None]
    return coefficients, losses.mean(0) - means @ coefficients


def _huber(residuals: Array) -> tuple[Array, Array]:
    """Sums (P,) of the Huber losses of residuals (P, N) over 0.02, so that they count nats, and slopes (P, N)."""
    slopes = np.clip(residuals / HUBER_NATS, -1.0, 1.0)
    sizes = np.abs(residuals)
    losses = np.where(sizes <= HUBER_NATS, sizes**2 / (2 * HUBER_NATS), sizes - HUBER_NATS / 2)
    return losses.sum(1), slopes


def _mixed(weights: Array, parameters: Array) -> Array:
    """(P, N) from (N, K) and (P, K). Not by `@`: threaded algebra on so few numbers stalls where cores are shared."""
    sums: Array = np.einsum("nk,pk->pn", weights, parameters)
    return sums


def _unmixed(weights: Array, slopes: Array) -> Array:
    """(P, K) from (N, K) and (P, N)."""
    sums: Array = np.einsum("nk,pn->pk", weights, slopes)
    return sums


Cost = Callable[[Array, Array], tuple[Array, Array]]
"""Parameters (P, D) and targets (P, N) to values (P,) and gradients (P, D)."""


def _minimise(cost: Cost, starts: Sequence[Array], targets: Array) -> Array:
    """The best end (M, D) for each target (M, N) from `starts`, each (M, D): L-BFGS, for all of them at once.

    Not scipy's, which takes one problem at a time and threads its algebra on twenty numbers: on a machine whose cores
    are shared it took thirty times as long.
    """
    point, goals = np.vstack(starts), np.vstack([targets] * len(starts))  # (P, D), (P, N)
    value, slope = cost(point, goals)
    history: deque[tuple[Array, Array, Array]] = deque(maxlen=10)
    active = np.ones(len(point), dtype=bool)  # (P,)
    for _ in range(_ITERATIONS):
        direction = _direction(slope, history)
        following, new_value, new_slope = _line_search(cost, point, goals, value, slope, direction, active)
        moved, bent = following - point, new_slope - slope
        curvature = (moved * bent).sum(1)
        inverse = np.divide(1.0, curvature, out=np.zeros_like(curvature), where=curvature > 1e-12)
        history.append((moved, bent, inverse))
        active = active & (value - new_value > 1e-7)
        point, value, slope = following, new_value, new_slope
        if not active.any():
            break
    best = value.reshape(len(starts), -1).argmin(0)  # (M,)
    ends: Array = point.reshape(len(starts), len(targets), -1)[best, np.arange(len(targets))]
    return ends


def _direction(slope: Array, history: Sequence[tuple[Array, Array, Array]]) -> Array:
    """Minus the inverse Hessian's estimate times the gradients (P, D): the two-loop recursion."""
    result, factors = slope.copy(), []
    for moved, bent, inverse in reversed(history):
        factor = inverse * (moved * result).sum(1)  # (P,)
        factors.append(factor)
        result -= factor[:, None] * bent
    scale = 1 / np.maximum(np.abs(slope).sum(1), 1.0)  # before there is a history: a step of at most 1
    for _, bent, inverse in history:  # the last pair with curvature counts
        known = inverse > 0
        scale[known] = 1 / (inverse[known] * (bent[known] ** 2).sum(1))
    result *= scale[:, None]
    for (moved, bent, inverse), factor in zip(history, reversed(factors), strict=True):
        result += (factor - inverse * (bent * result).sum(1))[:, None] * moved
    downhill = (result * slope).sum(1) > 0
    return np.where(downhill[:, None], -result, -scale[:, None] * slope)


def _line_search(
    cost: Cost, point: Array, goals: Array, value: Array, slope: Array, direction: Array, active: Array
) -> tuple[Array, Array, Array]:
    """Halve each active problem's step until its value falls enough (Armijo); who finds none stays."""
    point, value, slope = point.copy(), value.copy(), slope.copy()
    expected = 1e-4 * (direction * slope).sum(1)  # (P,), negative
    pending, step = np.flatnonzero(active), 1.0
    for _ in range(25):
        tried = point[pending] + step * direction[pending]
        tried_value, tried_slope = cost(tried, goals[pending])
        fell = tried_value <= value[pending] + step * expected[pending]
        chosen = pending[fell]
        point[chosen], value[chosen], slope[chosen] = tried[fell], tried_value[fell], tried_slope[fell]
        pending, step = pending[~fell], step / 2
        if not len(pending):
            break
    return point, value, slope
