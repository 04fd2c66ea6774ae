"""Intervals and tests for few seeds.

Nominal 95 % everywhere. At five seeds a Student t interval covers about 95 %, a percentile bootstrap 83 %, BCa 84 %
(simulated, normal data): so Student t below twenty values, the bootstrap from there on. Two intervals that overlap
or do not are no test; the interval of paired differences is one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from acodm_env.step_stats import Array

CONFIDENCE = 0.95
MANY = 20
"""Values from which the bootstrap covers what it says."""
FEWEST_FOR_IQM = 10
RESAMPLES = 9999
ONE_SEED, NO_SEEDS = "one seed: no interval", "no seeds"
"""`Interval.method` where there is no interval to speak of."""


@dataclass(frozen=True)
class Interval:
    """A point estimate and its 95 % interval."""

    mean: float | None
    """The estimate: a mean, or whatever `method` names; None if there is none."""
    low: float | None
    high: float | None
    """Bounds; both None without an interval; `high` alone is None where it has no finite upper bound."""
    num_seeds: int
    """Values behind it; of a median with censored values, those that are not censored."""
    method: str

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(values: Sequence[float] | Array) -> Interval:
    """Mean of finite values with its interval: Student t, or BCa bootstrap from twenty values on; none for one value.

    Raises:
        ValueError: a value is not finite.
    """
    sample = _finite(values)
    if len(sample) < 2:
        mean = float(sample[0]) if len(sample) else None
        return Interval(mean, None, None, len(sample), ONE_SEED if len(sample) else NO_SEEDS)
    if len(sample) >= MANY:
        return _bootstrap(sample, np.mean, "BCa", "mean")
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1)) * _standard_error(sample)
    mean = float(sample.mean())
    return Interval(mean, mean - half, mean + half, len(sample), "mean, Student t")


def paired_interval(first: Sequence[float] | Array, second: Sequence[float] | Array) -> Interval:
    """Mean of first − second, paired seed by seed, with its interval.

    Raises:
        ValueError: the lengths differ, or a value is not finite.
    """
    return mean_interval(_paired(first, second))


def paired_p_value(first: Sequence[float] | Array, second: Sequence[float] | Array) -> float | None:
    """Two-sided p of a paired t test of equal means; None for fewer than two pairs.

    Differences that are all the same have no spread to judge by: p is 1 if they are 0, else 0.
    """
    delta = _paired(first, second)
    if len(delta) < 2:
        return None
    error, mean = _standard_error(delta), float(delta.mean())
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.stats import t

    return float(2 * t.sf(abs(mean) / error, len(delta) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979), in the order given: controls the family-wise error without independence."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def interquartile_mean(values: Sequence[float] | Array) -> Interval | None:
    """Mean of the middle half with a percentile bootstrap interval; None below ten values.

    Below ten it drops too much of the sample, and too few distinct resamples are left. With ten normal values the
    interval covers about 92 %, with twenty 94 % (simulated).

    Source: Agarwal et al., arXiv 2108.13264.

    Raises:
        ValueError: a value is not finite.
    """
    sample = _finite(values)
    if len(sample) < FEWEST_FOR_IQM:
        return None

    def middle(x: Array, axis: int = -1) -> Any:
        from scipy.stats import trim_mean

        return trim_mean(x, 0.25, axis=axis)

    return _bootstrap(sample, middle, "percentile", "interquartile mean")


def median_interval(values: Sequence[float] | Array) -> Interval:
    """Median with the interval between two order statistics; a value of infinity is censored: "never".

    The interval assumes nothing about the distribution. It is the narrowest pair of order statistics l and n + 1 − l
    that covers at least 95 %, 1 − 2·P(Binomial(n, ½) < l); up to five values not even their whole range does, and
    `method` says what it covers. An estimate or bound that is never reached is None.

    Raises:
        ValueError: a value is NaN.
    """
    sample = np.sort(np.asarray(values, dtype=np.float64))
    if np.isnan(sample).any():
        raise ValueError("values: must not be NaN; leave out what is unknown, and give infinity for never")
    count, reached = len(sample), int(np.isfinite(sample).sum())
    if count < 2:
        return Interval(_or_none(sample[0]) if count else None, None, None, reached, ONE_SEED if count else NO_SEEDS)
    from scipy.stats import binom

    lowest = int(binom.ppf((1 - CONFIDENCE) / 2, count, 0.5))  # P(X < lowest) < 2.5 %
    lowest = max(lowest, 1)
    coverage = 1 - 2 * float(binom.cdf(lowest - 1, count, 0.5))
    middle = float(sample[(count - 1) // 2] + sample[count // 2]) / 2
    return Interval(
        mean=_or_none(middle),
        low=_or_none(sample[lowest - 1]),
        high=_or_none(sample[count - lowest]),
        num_seeds=reached,
        method=f"median of {count}, order statistics {lowest} and {count + 1 - lowest}: covers {coverage:.2%}",
    )


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _finite(values: Sequence[float] | Array) -> Array:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not np.isfinite(sample).all():
        raise ValueError("values: must be a list of finite numbers; a diverged run has no mean")
    return sample


def _paired(first: Sequence[float] | Array, second: Sequence[float] | Array) -> Array:
    one, other = _finite(first), _finite(second)
    if len(one) != len(other):
        raise ValueError(f"first, second: must have equal length, one value per seed; got {len(one)} and {len(other)}")
    difference: Array = one - other
    return difference


def _standard_error(sample: Array) -> float:
    return float(sample.std(ddof=1)) / math.sqrt(len(sample))


def _bootstrap(sample: Array, statistic: Callable[..., Any], method: str, what: str) -> Interval:
    """Bootstrap interval, the same in every call."""
    from scipy.stats import bootstrap

    estimate = float(statistic(sample))
    label = f"{what}, {method} bootstrap"
    if np.ptp(sample) == 0:  # BCa is undefined without any spread
        return Interval(estimate, estimate, estimate, len(sample), label)
    found = bootstrap(
        (sample,),
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method=method,
        vectorized=True,
        random_state=np.random.default_rng(0),  # scipy ≥ 1.15 would also call it rng
    ).confidence_interval
    return Interval(estimate, float(found.low), float(found.high), len(sample), label)
