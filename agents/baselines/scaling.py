"""ADO (arXiv 2410.11820): a scaling law per domain, fitted while training, says where the loss still falls fastest."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import ConfigError
from acodm_env.step_stats import Array, StepStats
from acodm_env.trainer import Mixer, RunInfo

from .doremi import Mixture, fixed_mixture

_NUM_POINTS = 48  # of a domain's loss history, at any horizon
_MIN_POINTS = 6  # three parameters from fewer say nothing
_DELTA = 1e-3  # nats of log loss, the paper's
_COARSE = (0.3, 0.1, 0.03, 0.01, 0.003)  # before it in a first fit, which comes from afar and wants a smooth way
_RIDGE = 1e-3  # damps a direction that the loss hardly depends on, such as e of a law that is all slope
_LOW = np.array([-12.0, -7.0, 0.0])  # of (a, e, α), with a at the middle of the data; e^-7 is no loss at all
_HIGH = np.array([5.0, 5.0, 0.8])  # the released prior keeps α within [0, 0.8]
_MIN_EXPONENT = 0.05
_ITERATIONS = 20


class Ado(Mixer):
    """Adaptive Data Optimization (arXiv 2410.11820, algorithm 1), with the released code's constants.

    Every so often, per domain, log L = logsumexp(a − α·log n, e) is fitted to the training losses, n the sequences of
    *all* domains seen so far (as the released code counts; so n is the same for all). At every step t:
    h ← 0.9h + 0.1·counts/B;  v_i = max(α_i, 0.05)·(L_i − exp e_i)/n with L_i from the law, that is, how fast it falls;
    ρ_i ∝ μ_i·h_i^½·v_i, at least 0.01, normalised;  w = 0.9p̄ + 0.1ρ;  p̄ ← (1 − 1/(t+1))·p̄ + ρ/(t+1).
    h and p̄ begin at the prior μ, which is also the mixture until the first fit.

    Deviations:
        * fits come `fits` times per run and start after `warmup_frac` of it, since 1,000 of 60,000 steps mean nothing
          at another horizon; the losses of the warm-up are left out, as in the released code (1,000 steps).
        * losses are averaged in 48 log-spaced bins of the horizon and each counts by the sequences behind it: the
          noise that the released code takes out with a Savitzky–Golay filter, in a state of fixed size. A step
          without a domain adds nothing to it (there: its last loss again).
        * the same objective is minimised by damped Gauss–Newton steps on its re-weighted squares, for all domains at
          once, from the last fit; a first fit comes from the best point of a grid by way of larger Huber thresholds.
          The paper runs L-BFGS from each of 512 grid points; scipy's, on all domains at once, was three times slower
          and, where cores are shared, a hundred times, since it threads its algebra on so few numbers.
        * the floor of ρ is at most half a uniform share, or it would force uniform weights at K ≥ 100.
        * the released code has (h(1−h))^½ for the paper's h^½, and a prior that keeps e ≥ 0.5, an irreducible loss of
          at least 1.65 nats: wrong for code and mathematics, so off by default (`min_log_irreducible`).
        * a domain with fewer than 6 points keeps its share μ_i of ρ; a diverged step changes nothing.
    """

    name = "ado"
    paper = "arXiv 2410.11820"
    needs = frozenset({"losses"})

    def __init__(
        self,
        prior: Mixture = "proportional",
        fits: int = 20,
        warmup_frac: float = 1 / 60,
        min_weight: float = 0.01,
        min_log_irreducible: float | None = None,
    ):
        """Take the options.

        Args:
            prior: μ: "proportional", "uniform", or what the mixer "static" takes as weights.
            fits: how often the laws are fitted during the run.
            warmup_frac: share of the run before the first fit.
            min_weight: smallest share of ρ, in [0, 1).
            min_log_irreducible: smallest e, ln nats; 0.5 is the released prior, None is free.

        Raises:
            ConfigError: an option out of range.
        """
        if fits < 1:
            raise ConfigError(f"fits={fits}: must be at least 1")
        for name, value in (("warmup_frac", warmup_frac), ("min_weight", min_weight)):
            if not 0 <= value < 1:
                raise ConfigError(f"{name}={value}: must be in [0, 1)")
        lowest = _LOW[1] if min_log_irreducible is None else min_log_irreducible
        if not _LOW[1] <= lowest < _HIGH[1]:
            raise ConfigError(
                f"min_log_irreducible={min_log_irreducible}: must be in [{_LOW[1]:g}, {_HIGH[1]:g}) or None; "
                f"it is a logarithm of nats"
            )
        self.prior, self.fits, self.warmup_frac, self.min_weight = prior, fits, warmup_frac, min_weight
        self._low = np.array([_LOW[0], lowest, _LOW[2]])

    def start(self, info: RunInfo) -> None:
        """Begin with the prior mixture and no history."""
        super().start(info)
        num_domains = info.num_domains
        self._prior = fixed_mixture(self.prior, info)  # μ
        self._recent = self._prior.copy()  # h
        self._mean = self._prior.copy()  # p̄
        self._weights = self._prior.copy()
        self._laws = np.full((num_domains, 3), np.nan)  # a, e, α; NaN = not fitted yet
        self._history = np.zeros((3, num_domains, _NUM_POINTS))  # sequences, and times log n, and times loss
        self._first = max(1, round(self.warmup_frac * info.horizon))
        self._every = max(1, round(info.horizon / self.fits))

    def weights(self) -> Array:
        """The mixture (K,) for the next step."""
        return self._weights.copy()

    def update(self, stats: StepStats) -> None:
        """Add the losses to the history, fit if it is time, and move the mixture."""
        if stats.diverged:
            return
        log_n = math.log(max(stats.drawn.sum(), 1.0))
        self._recent = 0.9 * self._recent + 0.1 * stats.realised
        if stats.step >= self._first:
            self._record(stats, log_n)
            if stats.step % self._every == 0:
                self._fit()
        known = np.isfinite(self._laws[:, 0])
        if known.any():
            greedy = self._greedy(known, log_n)  # ρ
            self._weights = 0.9 * self._mean + 0.1 * greedy
            self._weights /= self._weights.sum()
            self._mean += (greedy - self._mean) / (stats.step + 1)

    def _record(self, stats: StepStats, log_n: float) -> None:
        span = math.log((self.info.horizon + 1) / self._first)
        point = min(int(_NUM_POINTS * math.log(stats.step / self._first) / span), _NUM_POINTS - 1)
        seen = (stats.counts > 0) & np.isfinite(stats.losses) & (stats.losses > 0)
        counts = stats.counts[seen]
        self._history[:, seen, point] += counts, counts * log_n, counts * stats.losses[seen]

    def _fit(self) -> None:
        counts, log_n, losses = self._history  # (K, P) each
        enough = (counts > 0).sum(1) >= _MIN_POINTS
        if not enough.any():
            return
        counts, present = counts[enough], counts[enough] > 0
        points = np.maximum(counts, 1.0)
        laws = fit_laws(
            np.where(present, log_n[enough] / points, 0.0),
            np.log(np.where(present, losses[enough] / points, 1.0)),
            counts / counts.sum(1, keepdims=True),
            self._laws[enough],
            self._low,
        )
        if np.isfinite(laws).all():
            self._laws[enough] = laws

    def _greedy(self, known: NDArray[np.bool_], log_n: float) -> Array:
        """ρ (K,): the share of a domain by what its law promises, of one without a law its prior share."""
        amplitude, _, exponent = self._laws[known].T
        log_speed = np.log(np.maximum(exponent, _MIN_EXPONENT)) + amplitude - exponent * log_n  # 1/n is common
        score = self._prior[known] * np.sqrt(self._recent[known]) * np.exp(log_speed - log_speed.max())
        greedy = self._prior.copy()
        if score.sum() > 0:
            greedy[known] = self._prior[known].sum() * score / score.sum()
        clipped = np.maximum(greedy, min(self.min_weight, 0.5 / len(greedy)))
        normalised: Array = clipped / clipped.sum()
        return normalised

    def diagnostics(self) -> dict[str, float]:
        """Share of the domains that have a law."""
        return {"fitted_frac": float(np.isfinite(self._laws[:, 0]).mean())}

    def state_dict(self) -> dict[str, Any]:
        """Laws, history and running means."""
        return {
            "recent": self._recent.copy(),
            "mean": self._mean.copy(),
            "weights": self._weights.copy(),
            "laws": self._laws.copy(),
            "history": self._history.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._recent = np.array(state["recent"], dtype=np.float64)
        self._mean = np.array(state["mean"], dtype=np.float64)
        self._weights = np.array(state["weights"], dtype=np.float64)
        self._laws = np.array(state["laws"], dtype=np.float64)
        self._history = np.array(state["history"], dtype=np.float64)


def fit_laws(log_n: Array, log_losses: Array, weights: Array, start: Array, low: Array = _LOW) -> Array:
    """Fit log L = logsumexp(a − α·log n, e) to every domain's points, by a Huber loss (threshold 1e-3).

    Args:
        log_n: log of the sample count of every point (K, P).
        log_losses: log of the loss there (K, P), in nats.
        weights: of the points (K, P), each row summing to 1; 0 leaves a point out.
        start: laws (K, 3) to start from; NaN rows start from the best point of a grid.
        low: smallest a (where a row's points have their middle), e and α (3,).

    Returns:
        (a, e, α) per domain (K, 3).
    """
    middle = (weights * log_n).sum(1)  # (K,); a is fitted there, where it does not trade against α
    x = log_n - middle[:, None]
    laws = start.copy()
    laws[:, 0] -= laws[:, 2] * middle
    new = ~np.isfinite(laws).all(1)
    if new.any():
        laws[new] = _best_of_grid(x[new], log_losses[new], weights[new], low)
    laws = np.clip(laws, low, _HIGH)
    for delta in (*(_COARSE if new.any() else ()), _DELTA):
        laws = _descend(laws, x, log_losses, weights, low, delta)
    laws[:, 0] += laws[:, 2] * middle
    return laws


def _descend(laws: Array, x: Array, log_losses: Array, weights: Array, low: Array, delta: float) -> Array:
    """Levenberg–Marquardt on the re-weighted squares of the Huber loss; every domain goes its own way."""
    damping = np.full((len(laws), 1), 1e-2)
    loss, slope, curvature = _expand(laws, x, log_losses, weights, delta)
    for _ in range(_ITERATIONS):
        damped = curvature + np.eye(3) * (damping * (np.diagonal(curvature, axis1=1, axis2=2) + _RIDGE))[:, None]
        trial = np.clip(laws - np.linalg.solve(damped, slope[:, :, None])[:, :, 0], low, _HIGH)
        there = _expand(trial, x, log_losses, weights, delta)
        better = there[0] < loss
        laws[better] = trial[better]
        for here, new in zip((loss, slope, curvature), there, strict=True):
            here[better] = new[better]
        damping = np.clip(np.where(better[:, None], damping / 5, damping * 5), 1e-9, 1e9)
    return laws


def _expand(laws: Array, x: Array, log_losses: Array, weights: Array, delta: float) -> tuple[Array, Array, Array]:
    """Huber loss per domain (K,), its gradient (K, 3) and the curvature (K, 3, 3) of its re-weighted squares."""
    a, e, alpha = laws.T[:, :, None]  # (K, 1) each
    reducible = a - alpha * x  # (K, P)
    total = np.logaddexp(reducible, e)
    error = total - log_losses
    size = np.abs(error)
    inside = np.minimum(size, delta)
    loss = (weights * inside * (size - 0.5 * inside)).sum(1)
    pull = weights * np.minimum(1.0, delta / np.maximum(size, 1e-30))  # Huber's as the weight of a square
    share = np.exp(reducible - total)  # of the reducible part in the loss
    slopes = np.stack([share, 1 - share, -share * x], axis=1)  # (K, 3, P)
    weighted = slopes * pull[:, None]
    return loss, (weighted * error[:, None]).sum(2), weighted @ slopes.transpose(0, 2, 1)


def _best_of_grid(x: Array, log_losses: Array, weights: Array, low: Array) -> Array:
    """The grid's best (a, e, α) per domain (K, 3): e a share of the smallest loss, a what is left in the middle."""
    level = (weights * log_losses).sum(1)  # (K,) log loss in the middle
    least = np.where(weights > 0, log_losses, np.inf).min(1)
    best, lowest = np.zeros((len(x), 3)), np.full(len(x), np.inf)
    for share in (0.05, 0.25, 0.5, 0.7, 0.85, 0.95):
        e = np.maximum(np.log(share) + least, low[1])  # (K,)
        a = np.log(np.maximum(np.exp(level) - np.exp(e), 1e-3))
        for alpha in (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8):
            error = np.logaddexp(a[:, None] - alpha * x, e[:, None]) - log_losses
            loss = (weights * np.abs(error)).sum(1)
            better = loss < lowest
            lowest[better] = loss[better]
            best[better] = np.stack([a, e, np.full_like(a, alpha)], axis=1)[better]
    return best
