"""How far a number over documents would move with other documents: the bootstrap, and what stands in for it below 20.

A score is a function of sums over documents, such as nats over tokens; a document is drawn whole, because its tokens
are not independent. Where several domains count the same, each is resampled by itself (strata). The percentile
bootstrap covers too little for few documents (83 % instead of 95 % for five values): there the score is linearised
and Student t is used. Paired comparisons of two models put both models' columns side by side: they are drawn together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acodm_env.step_stats import Array

CONFIDENCE = 0.95
MANY = 20
"""Documents per stratum from which the bootstrap is used."""
NUM_RESAMPLES = 2000

Statistic = Callable[[NDArray[np.inexact]], NDArray[np.inexact]]
"""From sums (strata, n, columns) to n values, by arithmetic that complex numbers pass through (no abs, max, round)."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score with its standard error and 95 % interval; None where documents are too few or a number is not finite."""

    value: float | None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    method: str = "none"
    """"bootstrap", "linearised, Student t" or "none"."""


def resample_sums(values: Array, num: int = NUM_RESAMPLES, seed: int | Sequence[int] = 0) -> Array:
    """Sums of documents drawn with replacement, as many as there are; memory does not grow with `num` × documents.

    Args:
        values: a row per document (D, C), C numbers that are drawn together.
        num: how many times.
        seed: of the draws: the same seed and number of documents, the same draws.

    Returns:
        Sums (num, C).
    """
    generator, count = np.random.default_rng(seed), len(values)
    sums = np.zeros((num, values.shape[1]))
    for sum_ in sums if count else ():
        times_drawn = np.bincount(generator.integers(0, count, count), minlength=count)  # (D,)
        sum_[:] = times_drawn.astype(np.float64) @ values
    return sums


class Resampled:
    """Documents in strata, resampled once, for any number of scores."""

    def __init__(self, strata: Sequence[Array], num: int = NUM_RESAMPLES, seed: int = 0):
        """Keep the documents; they are resampled when a score first needs it.

        Args:
            strata: per stratum a row per document (D, C), the same columns everywhere.
            num: resamples.
            seed: of the draws; every stratum has its own.
        """
        self.strata = [np.asarray(values, dtype=np.float64) for values in strata]
        self.num, self.seed = num, seed
        self._sums: dict[int, Array] = {}

    def estimate(self, statistic: Statistic, only: int | None = None) -> Estimate:
        """The score over all strata, or over one of them, with its interval.

        Args:
            statistic: see `Statistic`.
            only: index of the one stratum to look at.
        """
        chosen = range(len(self.strata)) if only is None else [only]
        totals = np.stack([self.strata[index].sum(0) for index in chosen])  # (strata, C)
        with np.errstate(all="ignore"):  # a ratio over nothing has no value, which is said by None
            value = float(statistic(totals[:, None])[0])
            fewest = min(len(self.strata[index]) for index in chosen)
            if not math.isfinite(value) or fewest < 2:
                return Estimate(value=value if math.isfinite(value) else None)
            if fewest < MANY:
                return _linearised(value, [self.strata[index] for index in chosen], totals, statistic)
            draws = statistic(np.stack([self._resampled(index) for index in chosen]))  # (num,)
        if not np.isfinite(draws).all():
            return Estimate(value=value)
        low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Estimate(
            value=value, stderr=float(draws.std(ddof=1)), low=float(low), high=float(high), method="bootstrap"
        )

    def _resampled(self, index: int) -> Array:
        if index not in self._sums:
            self._sums[index] = resample_sums(self.strata[index], self.num, (self.seed, index))
        return self._sums[index]


def _linearised(value: float, strata: Sequence[Array], totals: Array, statistic: Statistic) -> Estimate:
    """The delta method: a score is nearly linear in its sums, so its variance is that of a sum over documents.

    Degrees of freedom over several strata are Satterthwaite's (Biometrics Bulletin 2, 1946).
    """
    from scipy.stats import t

    variances = np.array([_variance(index, strata[index], totals, statistic) for index in range(len(strata))])
    stderr = math.sqrt(variances.sum())
    if not math.isfinite(stderr):
        return Estimate(value=value)
    freedom = np.array([len(values) - 1 for values in strata], dtype=np.float64)
    spread = float((variances**2 / freedom).sum())
    degrees = float(variances.sum() ** 2 / spread) if spread > 0 else float(freedom.sum())
    half = float(t.ppf((1 + CONFIDENCE) / 2, degrees)) * stderr
    return Estimate(value=value, stderr=stderr, low=value - half, high=value + half, method="linearised, Student t")


def _variance(index: int, values: Array, totals: Array, statistic: Statistic) -> float:
    """Variance that one stratum's documents (D, C) give to the score."""
    step = 1e-30  # an imaginary one: the derivative is exact, for nothing is subtracted
    moved = np.repeat(totals[:, None].astype(np.complex128), len(values), axis=1)  # (strata, D, C)
    moved[index] += 1j * step * (values - values.mean(0))
    influence = np.imag(statistic(moved)) / step  # (D,), how far each document moves the score
    return float(len(values) / (len(values) - 1) * (influence**2).sum())
