import math

import numpy as np
import pytest

from acodm_env.experiments.comparison import statistics
from acodm_env.experiments.comparison.statistics import (
    Interval,
    holm,
    interquartile_mean,
    mean_interval,
    median_interval,
    paired_interval,
    paired_p_value,
)


def test_student_t_interval_by_hand():
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])  # sd √2.5, standard error √0.5, t(0.975, 4) = 2.776445
    assert found.mean == 3.0
    assert found.low == pytest.approx(3 - 2.776445 * math.sqrt(0.5), abs=1e-6)
    assert found.high == pytest.approx(3 + 2.776445 * math.sqrt(0.5), abs=1e-6)
    assert (found.num_seeds, found.method) == (5, "mean, Student t")
    assert found.excludes_zero
    assert not mean_interval([-1.0, 0.0, 2.0]).excludes_zero


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert mean_interval([2.5]) == Interval(2.5, None, None, 1, "one seed: no interval")
    assert mean_interval([]) == Interval(None, None, None, 0, "no seeds")
    assert not mean_interval([2.5]).excludes_zero


def test_values_that_are_not_finite_are_refused():
    for values in ([1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="finite"):
            mean_interval(values)
        with pytest.raises(ValueError, match="finite"):
            interquartile_mean(values)
    with pytest.raises(ValueError, match="NaN"):
        median_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="equal length"):
        paired_interval([1.0, 2.0], [1.0])


def test_pairing_removes_what_the_seeds_share():
    seeds = np.array([0.0, 10.0, 20.0, 30.0, 40.0])
    first, second = seeds + np.arange(1.0, 6.0), seeds
    assert paired_interval(first, second) == mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert paired_p_value(first, second) == pytest.approx(0.0132356, abs=1e-6)  # t = 3/√0.5 = 4.2426, 4 degrees
    assert paired_p_value(second, first) == pytest.approx(0.0132356, abs=1e-6)


def test_equal_differences_have_a_p_without_a_warning():
    assert paired_p_value([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert paired_p_value([2.0, 3.0], [1.0, 2.0]) == 0.0
    assert paired_p_value([2.0], [1.0]) is None
    assert paired_interval([1.0, 2.0], [1.0, 2.0]) == Interval(0.0, 0.0, 0.0, 2, "mean, Student t")


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3·0.01; 2·0.03; max(0.06, 1·0.04)
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_median_of_five_covers_less_than_it_should_and_says_so():
    found = median_interval([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.mean, found.low, found.high, found.num_seeds) == (3.0, 1.0, 5.0, 5)
    assert found.method == "median of 5, order statistics 1 and 5: covers 93.75%"  # 1 − 2·(1/2)⁵


def test_median_interval_uses_the_narrowest_order_statistics_that_cover():
    found = median_interval(np.arange(1.0, 11.0))
    assert (found.mean, found.low, found.high) == (5.5, 2.0, 9.0)
    assert "covers 97.85%" in found.method  # 1 − 2·(1 + 10)/1024; the next pair would cover 89 %
    assert median_interval(np.arange(1.0, 9.0)).low == 1.0  # 1 − 2·(1 + 8)/256 = 93 % would not do


def test_censored_values_are_never_and_not_dropped():
    found = median_interval([1.0, 2.0, 3.0, math.inf, math.inf])
    assert (found.mean, found.low, found.high, found.num_seeds) == (3.0, 1.0, None, 3)
    found = median_interval([1.0, math.inf, math.inf])
    assert (found.mean, found.low, found.high, found.num_seeds) == (None, 1.0, None, 1)
    found = median_interval([math.inf] * 4)
    assert (found.mean, found.low, found.high, found.num_seeds) == (None, None, None, 0)
    assert median_interval([1.0, 2.0, math.inf, math.inf]).mean is None  # halfway between 2 and never
    assert median_interval([math.inf]) == Interval(None, None, None, 0, "one seed: no interval")
    assert median_interval([0.5]) == Interval(0.5, None, None, 1, "one seed: no interval")
    assert median_interval([]).method == "no seeds"


def test_interquartile_mean_needs_ten_and_ignores_the_tails():
    assert interquartile_mean(np.arange(9.0)) is None
    values = [*np.arange(1.0, 12.0), 1000.0]
    found = interquartile_mean(values)
    assert found is not None
    assert found.mean == pytest.approx(6.5)  # the mean of 4 … 9
    assert found.low is not None
    assert found.low < 6.5 < found.high < 100
    assert found.method == "interquartile mean, percentile bootstrap"


def test_bootstrap_from_twenty_is_the_same_every_time_and_leaves_the_global_generator_alone():
    values = np.arange(20.0)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = mean_interval(values), mean_interval(values)
    assert first == second
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert first.method == "mean, BCa bootstrap"
    assert first.low == pytest.approx(9.5 - 2.55, abs=0.2)  # ± 1.96·5.77/√20, by the normal approximation
    assert mean_interval(values[:19]).method == "mean, Student t"
    assert mean_interval([2.0] * 20) == Interval(2.0, 2.0, 2.0, 20, "mean, BCa bootstrap")


def test_coverage_at_five_seeds_by_simulation():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(3000, 5))

    def covered(intervals):
        return np.mean([found.low <= 0 <= found.high for found in intervals])

    assert 0.93 < covered(map(mean_interval, samples)) < 0.96
    assert 0.92 < covered(map(median_interval, samples)) < 0.955  # 93.75 % exactly
    resampled = rng.integers(5, size=(400, 5))
    means = samples[:, resampled].mean(-1)  # (3000, 400)
    low, high = np.quantile(means, (0.025, 0.975), axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.88  # what a percentile bootstrap would do


def test_coverage_where_the_bootstrap_begins(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    samples = np.random.default_rng(1).normal(size=(300, 20))
    intervals = [mean_interval(sample) for sample in samples]
    assert np.mean([found.low <= 0 <= found.high for found in intervals]) > 0.88
