import numpy as np
import pytest

from acodm_env.errors import ConfigError
from acodm_env.interaction import InteractionConfig, InteractionTracker
from acodm_env.step_stats import StepStats
from toy import ToyGradients


class FixedGram:
    """Gradient sums that answer with a given Gram matrix."""

    def __init__(self, gram, noise=None):
        self._gram = np.array(gram, dtype=float)
        self._noise = np.zeros(len(gram)) if noise is None else np.array(noise, dtype=float)

    def __add__(self, other):
        raise AssertionError("not merged here")

    def gram(self):
        return self._gram, self._noise


def window(gram, counts=None, weights=None, noise=None):
    num_domains = len(gram)
    counts = np.ones(num_domains) if counts is None else np.array(counts, dtype=float)
    return StepStats(
        step=1,
        tokens=1,
        requested=np.full(num_domains, 1 / num_domains) if weights is None else np.array(weights),
        realised=counts / counts.sum(),
        counts=counts,
        loss_tokens=counts,
        losses=np.ones(num_domains),
        epochs=counts,
        drawn=counts,
        gradients=FixedGram(gram, noise),
    )


GRAM = [[4.0, 1.0, -2.0], [1.0, 2.0, 3.0], [-2.0, 3.0, 6.0]]  # tr/K = 4; row sums off the diagonal: −1, 4, 1


def tracker(**options):
    return InteractionTracker(3, InteractionConfig(**{"smoothing": 0.0, "scale_smoothing": 0.0} | options))


def test_row_sums_over_the_past_scale_by_hand():
    running = tracker()
    running.update(window(GRAM))
    np.testing.assert_array_equal(running.interaction, [0, 0, 0])  # no past yet
    running.update(window(np.array(GRAM) * 10))
    np.testing.assert_allclose(running.interaction, np.clip(np.array([-10, 40, 10]) / 4, -6, 6))  # s is the past one
    running.update(window(GRAM))
    np.testing.assert_allclose(running.interaction, np.array([-1, 4, 1]) / 40)


def test_values_weigh_the_columns_and_the_own_gradient_counts():
    """Σ_j v_j H_ij with v = (2, 0, 1): (8 − 2, 2 + 3, −4 + 6); an unknown entry counts only where its value does."""
    values = np.array([2.0, 0.0, 1.0])
    running = tracker()
    running.update(window(GRAM))
    running.update(window(GRAM), values)
    np.testing.assert_allclose(running.interaction, np.array([6, 5, 2]) / 4)
    holes = np.array(GRAM)
    holes[1, 1] = holes[2, 2] = np.nan
    running.update(window(holes * 2), values)
    np.testing.assert_allclose(running.interaction, np.array([12, 10, 2 * 4 / 4]) / [4, 4, 4], atol=2)
    np.testing.assert_allclose(running.interaction[:2], np.array([12, 10]) / 4)
    assert running.interaction[2] == 2 / 4  # H_22 is unknown: its last value stays


def test_log_norm_is_the_log_of_norm_over_scale():
    running = tracker()
    np.testing.assert_array_equal(running.log_norm, [0, 0, 0])
    running.update(window(GRAM))
    np.testing.assert_allclose(running.log_norm, 0.5 * np.log(np.array([4, 2, 6]) / 4))


def test_absent_domain_keeps_its_last_value():
    running = tracker()
    running.update(window(GRAM))
    running.update(window(GRAM))
    before = running.interaction.copy()
    gram = np.array(GRAM)
    gram[2, :] = gram[:, 2] = np.nan
    running.update(window(gram, counts=[1, 1, 0]))
    assert running.interaction[2] == before[2]
    np.testing.assert_allclose(running.interaction[:2], [1 / 4, 1 / 4])


def test_smoothing_by_hand():
    running = tracker(smoothing=0.75)
    for _ in range(3):
        running.update(window(GRAM))
    expected = np.array([-1, 4, 1]) / 4 * (1 - 0.75**2)
    np.testing.assert_allclose(running.interaction, expected)


def test_importance_weight_divides_by_the_mixture():
    running = tracker(importance_weighted=True)
    for _ in range(2):
        running.update(window(GRAM, weights=[0.5, 0.25, 0.25]))
    np.testing.assert_allclose(running.interaction, np.array([-2, 16, 4]) / 4)


def test_negative_trace_by_noise_does_not_flip_the_sign():
    running = tracker()
    noisy = np.diag([-1.0, -1.0, -1.0])
    running.update(window(noisy, noise=[101.0, 101.0, 101.0]))
    running.update(window(GRAM))
    np.testing.assert_allclose(running.interaction, [-1, 4, 1])  # scale: a hundredth of the noisy norm 100
    assert np.isfinite(running.log_norm).all()


def test_state_round_trip():
    first, second = tracker(smoothing=0.5), tracker(smoothing=0.5)
    for _ in range(3):
        first.update(window(GRAM))
    second.load_state_dict(first.state_dict())
    for running in (first, second):
        running.update(window(np.array(GRAM) * 2))
    np.testing.assert_array_equal(first.interaction, second.interaction)
    np.testing.assert_array_equal(first.log_norm, second.log_norm)


def test_bad_smoothing_is_refused():
    with pytest.raises(ConfigError, match=r"smoothing=1\.0"):
        InteractionConfig(smoothing=1.0)


def test_gram_is_formed_after_the_gradients_are_summed():
    """Gram(G1 + G2) is not Gram(G1) + Gram(G2): two opposite gradients cancel."""
    one = ToyGradients(np.array([[1.0, 0.0], [0.0, 1.0]]), np.ones(2))
    other = ToyGradients(np.array([[-1.0, 0.0], [0.0, 1.0]]), np.ones(2))
    np.testing.assert_allclose((one + other).gram()[0], [[0, 0], [0, 1]])
