"""Response surfaces: held-out losses as a function of the mixture, fitted on finished runs.

Weights are (N, K) mixtures, losses (N, M) nats; each target is fitted on its own. Every law is a frozen value with
its parameters as arrays, `fit` and `predict`; which one by name: `fit_law("power", weights, losses)`.

With fewer runs than parameters (a few dozen runs, K of ten) a fit must be told what to believe: that a domain has *no*
effect until the runs show one. The linear laws get a ridge whose strength leave-one-out error chooses, the curved ones
a Gaussian prior of fixed strength on the size of each domain's effect, which hundreds of runs override. So with
nothing to learn from every law predicts the mean.

On the 512 1M-parameter runs of RegMix (17 domains, 13 losses; arXiv 2407.01492) the mean Spearman correlation with held
out runs is, at 1M / 60M / 1B parameters: linear .830 / .829 / .712, log-linear .971 / .968 / .915, mixing law
.972 / .967 / .934, power law .982 / .976 / .947.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from acodm_env.errors import ConfigError, unknown
from acodm_env.trainer import Array

HUBER_NATS = 0.02
"""Residual at which the curved laws' loss turns from square to linear (arXiv 2403.16952)."""
_PRIOR = 0.03  # half the penalty on one unit of effect, where a run off by x nats costs x²/0.04, or |x| − 0.01
_LARGEST = 30.0  # exponent: e³⁰ nats is no loss any more, and must not overflow
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
        num_domains = weights.shape[1]

        def cost(parameters: Array, target: Array) -> tuple[float, Array]:
            exponents, floor = parameters[:-1], parameters[-1]
            curve = np.exp(np.minimum(weights @ exponents, _LARGEST))  # (N,)
            value, slope = _huber(floor + curve - target)
            effects = (exponents - exponents.mean()) * spread
            pull = effects * spread
            gradient = weights.T @ (slope * curve) + 2 * _PRIOR * (pull - pull.mean())
            return value + _PRIOR * float(effects @ effects), np.append(gradient, slope.sum())

        def starts(target: Array) -> list[Array]:
            floors = [share * target.min() for share in (0.2, 0.6, 0.9)]
            return [np.append(np.full(num_domains, np.log(target.mean() - floor)), floor) for floor in floors]

        bounds = [(None, None)] * num_domains + [(0.0, None)]
        fitted = np.array([_minimise(cost, starts(target), bounds, target) for target in losses.T])
        return cls(fitted[:, :-1], fitted[:, -1])

    def predict(self, weights: Array) -> Array:
        """Losses (N, M), nats, at the mixtures (N, K)."""
        losses: Array = self.floors + np.exp(np.minimum(weights @ self.exponents.T, _LARGEST))
        return losses


@dataclass(frozen=True)
class PowerLaw:
    """L_i = c_i + e^k_i·(1e-4 + Σ_j e^a_ij w_j)^(−e^b_i), c_i ≥ 0: a scaling law in the *useful* share of the data.

    e^a_ij is how much a token of domain j helps target i. No paper has it; it is the best of these on RegMix's runs.
    The prior is on a_ij: all equal means that the mixture has no effect.
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
        num_domains = weights.shape[1]

        def cost(parameters: Array, target: Array) -> tuple[float, Array]:
            useful, (scale, exponent, floor) = parameters[:-3], parameters[-3:]
            helps, power = np.exp(useful), np.exp(exponent)
            share = _FLOOR + weights @ helps  # (N,)
            curve = np.exp(scale - power * np.log(share))  # (N,)
            value, slope = _huber(floor + curve - target)
            rise = slope * curve
            gradient = 2 * _PRIOR * useful - power * helps * (weights.T @ (rise / share))
            others = [rise.sum(), -power * (rise @ np.log(share)), slope.sum()]
            return value + _PRIOR * float(useful @ useful), np.append(gradient, others)

        def starts(target: Array) -> list[Array]:
            scale = np.log(target.std() + 0.1)
            return [np.append(np.zeros(num_domains), [scale, b, 0.9 * target.min()]) for b in (-1.0, 0.0)]

        bounds = [(-15.0, 8.0)] * num_domains + [(-10.0, 5.0), (-4.0, 2.0), (0.0, None)]
        fitted = np.array([_minimise(cost, starts(target), bounds, target) for target in losses.T])
        return cls(fitted[:, :-3], fitted[:, -3], fitted[:, -2], fitted[:, -1])

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


def _huber(residuals: Array) -> tuple[float, Array]:
    """Sum of the Huber losses over 0.02, so that it counts nats, and its gradient (N,)."""
    slope = np.clip(residuals / HUBER_NATS, -1.0, 1.0)
    size = np.abs(residuals)
    return float(np.where(size <= HUBER_NATS, size**2 / (2 * HUBER_NATS), size - HUBER_NATS / 2).sum()), slope


def _minimise(cost: Callable[..., Any], starts: Sequence[Array], bounds: Any, target: Array) -> Array:
    """The best end of L-BFGS from `starts`."""
    from scipy.optimize import minimize

    limits = {"maxiter": 500, "maxfun": 1000, "maxcor": 10}
    ends = [
        minimize(cost, start, args=(target,), jac=True, method="L-BFGS-B", bounds=bounds, options=limits)
        for start in starts
    ]
    best: Array = min(ends, key=lambda end: float(end.fun)).x
    return best
