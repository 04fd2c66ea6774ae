"""Intervals over documents: by hand, against the textbook's formulas, and how often they cover the truth."""

import numpy as np
import pytest
from scipy import stats

from acodm_env.experiments.evaluation.bootstrap import MANY, Resampled, resample_sums

RNG = np.random.default_rng


def ratio(sums):
    return (sums[..., 0] / sums[..., 1]).mean(0)


def test_resampled_sums_are_sums_of_drawn_documents():
    values = np.array([[1.0, 10.0], [100.0, 1000.0], [10000.0, 100000.0]])
    sums = resample_sums(values, num=500, seed=3)
    assert sums.shape == (500, 2)
    assert np.array_equal(sums[:, 1], 10 * sums[:, 0])  # a document is drawn whole
    digits = np.stack([sums[:, 0] % 100, sums[:, 0] // 100 % 100, sums[:, 0] // 10000], axis=1)
    assert (digits.sum(1) == 3).all()  # as many as there are, with replacement
    assert len(np.unique(sums[:, 0])) == 10  # every multiset of three of three
    assert np.array_equal(sums, resample_sums(values, num=500, seed=3))
    assert not np.array_equal(sums, resample_sums(values, num=500, seed=4))
    assert np.array_equal(resample_sums(values[:0], num=4), np.zeros((4, 2)))


def test_global_generator_is_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    Resampled([RNG(0).random((30, 2))]).estimate(ratio)
    assert (before == np.random.get_state()[1]).all()  # noqa: NPY002


def test_percentile_interval_of_a_ratio():
    values = RNG(0).gamma(2.0, size=(50, 2))
    found = Resampled([values]).estimate(ratio)
    draws = np.divide(*resample_sums(values, seed=(0, 0)).T)
    assert found.method == "bootstrap"
    assert found.value == pytest.approx(values[:, 0].sum() / values[:, 1].sum())
    assert (found.low, found.high) == pytest.approx(np.percentile(draws, [2.5, 97.5]))
    assert found.stderr == pytest.approx(draws.std(ddof=1))


def test_few_documents_by_hand():
    """Nats 2, 4, 9 over tokens 1, 2, 3: r = 15/6; residuals -0.5, -1, 1.5; variance 3/2 · 3.5 / 36."""
    found = Resampled([np.array([[2.0, 1], [4, 2], [9, 3]])]).estimate(ratio)
    stderr = np.sqrt(1.5 * 3.5 / 36)
    assert found.method == "linearised, Student t"
    assert found.value == 2.5
    assert found.stderr == pytest.approx(stderr, rel=1e-12)
    assert found.high - found.value == pytest.approx(4.302652729696 * stderr)  # Student t, 2 degrees of freedom
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_a_mean_of_few_values_is_the_t_interval():
    values = RNG(1).normal(size=7)
    found = Resampled([np.stack([values, np.ones(7)], axis=1)]).estimate(ratio)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 6, values.mean(), stats.sem(values)))


def test_two_strata_of_few_values_are_welchs_interval():
    """Half of the difference of two means: Welch's t interval has Satterthwaite's degrees of freedom."""
    first, second = RNG(2).normal(size=5), RNG(3).normal(scale=3, size=9)
    strata = [np.stack([sign * values, np.ones(len(values))], axis=1) for sign, values in ((1, first), (-1, second))]
    found = Resampled(strata).estimate(ratio)
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low / 2, expected.high / 2))


def test_an_exponential_is_linearised_through_its_derivative():
    strata = [RNG(4).gamma(3.0, size=(8, 2))]
    plain = Resampled(strata).estimate(ratio)
    found = Resampled(strata).estimate(lambda sums: np.exp(sums[..., 0] / sums[..., 1]).mean(0))
    assert found.stderr == pytest.approx(np.exp(plain.value) * plain.stderr)


def test_strata_count_the_same_and_are_drawn_by_themselves():
    large, small = np.ones((1000, 2)), np.stack([RNG(5).normal(10, 1, 25), np.ones(25)], axis=1)
    both = Resampled([large, small])
    found, alone = both.estimate(ratio), both.estimate(ratio, only=1)
    assert found.value == pytest.approx((1 + alone.value) / 2)
    assert found.stderr == pytest.approx(alone.stderr / 2)  # the first stratum does not vary
    assert both.estimate(ratio, only=0).stderr == 0
    assert both.estimate(ratio, only=0).low == 1


@pytest.mark.parametrize("count", [1, 2, MANY - 1, MANY])
def test_method_follows_the_smallest_stratum(count):
    values = RNG(6).random((100, 2)) + 1
    found = Resampled([values, values[:count]]).estimate(ratio)
    expected = {1: "none", 2: "linearised, Student t", MANY - 1: "linearised, Student t", MANY: "bootstrap"}[count]
    assert found.method == expected
    assert found.value is not None
    assert (found.stderr is None) == (found.low is None) == (found.high is None) == (count == 1)


def test_paired_models_are_drawn_together():
    """A model that is 0.1 better on every document is better by 0.1 without doubt, however they scatter."""
    nats, tokens = RNG(7).normal(100, 30, 40), np.full(40, 20.0)
    columns = np.stack([nats, tokens, nats - 0.1 * tokens, tokens], axis=1)
    found = Resampled([columns]).estimate(lambda sums: ratio(sums[..., :2]) - ratio(sums[..., 2:]))
    assert (found.low, found.value, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_no_value_where_there_is_nothing_to_divide_by():
    assert Resampled([np.zeros((30, 2))]).estimate(ratio).value is None
    assert Resampled([np.zeros((0, 2))]).estimate(ratio).value is None
    values = np.stack([np.ones(30), np.zeros(30)], axis=1)
    values[0, 1] = 1  # some resamples have no document with tokens
    found = Resampled([values]).estimate(ratio)
    assert (found.value, found.stderr, found.low, found.high) == (30, None, None, None)


@pytest.mark.parametrize(("count", "least"), [(6, 0.92), (60, 0.92)])
def test_intervals_cover_the_true_ratio(count, least):
    """Documents of very different length whose loss goes with it; nominal 95 % (60 documents: bootstrap)."""
    rng, hits = RNG(8), 0
    for _ in range(400):
        tokens = rng.lognormal(5, 0.5, count)
        nats = tokens * (3 + rng.normal(0, 0.5, count))  # the true ratio is 3
        found = Resampled([np.stack([nats, tokens], axis=1)], num=400).estimate(ratio)
        hits += found.low <= 3 <= found.high
    assert least <= hits / 400 <= 0.99


def test_a_hundred_thousand_documents():
    found = Resampled([RNG(9).gamma(2.0, size=(100_000, 3))], num=100).estimate(ratio)
    assert found.value == pytest.approx(1, abs=0.02)
    assert found.stderr == pytest.approx(np.sqrt(2 / 2 / 100_000), rel=0.3)
