from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acodm_env.surrogate.dynamics import FLOOR, Parameters, gains, learn, losses, slopes, useful, worth

examples = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)


def random_law(rng, num_domains=4, num_targets=3, **changes):
    """Parameters of a plausible law, float64."""
    values = {
        "helps": np.exp(rng.normal(0, 1.5, (num_targets, num_domains))),
        "scales": rng.normal(0, 0.5, num_targets),
        "powers": rng.uniform(0.05, 1.0, num_targets),
        "floors": rng.uniform(0, 2, num_targets),
        "start": rng.uniform(1e-3, 0.1, num_targets),
        "forgetting": rng.uniform(0, 3, num_domains),
        "sizes": rng.uniform(0.05, 0.5, num_domains),
        "repetition": np.array([15.4]),
        "pace": np.array([0.0]),
    }
    return Parameters(**values | changes)


def play(law, schedule, xp=np):
    """Memory (K,) after a run of length 1 under a schedule (T, K)."""
    memory = epochs = xp.zeros_like(law.forgetting)
    for weights in schedule:
        memory, epochs = learn(law, memory, epochs, weights, 1 / len(schedule), xp)
    return memory


# --- worth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "repetition", "fresh"),
    [
        (0.0, 15.4, 0.0),
        (0.3, 15.4, 0.3),
        (1.0, 15.4, 1.0),
        (2.0, 1.0, 1 + 1 - np.exp(-1)),  # 1.632
        (4.0, 15.4, 1 + 15.4 * (1 - np.exp(-3 / 15.4))),  # 3.726: four passes are worth almost four
        (1e6, 15.4, 16.4),  # the limit, 1 + R
        (5.0, 1e9, 5.0),  # nothing wears out
    ],
)
def test_worth_by_hand(epochs, repetition, fresh):
    assert worth(np.array(epochs), np.array([repetition]), np) == pytest.approx(fresh, rel=1e-7)


@examples
@given(st.floats(0.01, 60), st.floats(0.5, 50))
def test_a_pass_is_worth_its_derivative(epochs, repetition):
    """1 in the first pass, e^(−(e−1)/R) later: continuous at the first pass's end."""
    width = 1e-6
    above, below = (worth(np.array(epochs + sign * width), np.array([repetition]), np) for sign in (1, -1))
    expected = np.exp(-max(epochs - 1, 0) / repetition)
    assert (above - below) / (2 * width) == pytest.approx(expected, abs=1e-5)


# --- memory ------------------------------------------------------------------------------------------------


def test_gains_by_hand():
    kept, gain = gains(np.array([np.log(2)]), 0.5, np)
    assert kept == pytest.approx(np.sqrt(0.5))
    assert gain == pytest.approx((1 - np.sqrt(0.5)) / (0.5 * 0.5))
    kept, gain = gains(np.array([np.log(2)]), 1.0, np)
    assert (kept, gain) == (pytest.approx(0.5), pytest.approx(1.0))


def test_without_forgetting_nothing_is_lost_and_nothing_is_scaled():
    for rate in (0.0, 1e-12):
        kept, gain = gains(np.array([rate]), 0.025, np)
        assert (kept, gain) == (pytest.approx(1.0, abs=1e-9), pytest.approx(1.0, abs=1e-9))


@examples
@given(seeds, st.integers(1, 50))
def test_a_static_run_ends_at_its_mixture(seed, steps):
    rng = np.random.default_rng(seed)
    law = random_law(rng, sizes=np.full(4, 1e6))
    weights = rng.dirichlet(np.ones(4))
    np.testing.assert_allclose(play(law, [weights] * steps), weights, rtol=1e-9)


def test_learning_with_repetition_by_hand():
    """Half the run on a domain of a quarter of the run: two passes, worth 1 + R(1 − e^(−1/R)), then a third."""
    law = random_law(
        np.random.default_rng(0), 1, 1, sizes=np.array([0.25]), forgetting=np.zeros(1), repetition=np.array([2.0])
    )
    one = np.ones(1)
    memory, epochs = learn(law, np.zeros(1), np.zeros(1), one, 0.5, np)
    assert epochs == pytest.approx(2.0)
    assert memory == pytest.approx(0.25 * (1 + 2 * (1 - np.exp(-0.5))))
    later, epochs = learn(law, memory, epochs, one, 0.25, np)
    assert epochs == pytest.approx(3.0)
    assert later - memory == pytest.approx(0.25 * 2 * (np.exp(-0.5) - np.exp(-1.0)))


@examples
@given(seeds)
def test_late_data_is_remembered_better_where_there_is_forgetting(seed):
    """The same data, domain 0 first or last."""
    rng = np.random.default_rng(seed)
    forgets = np.array([rng.uniform(0.1, 5.0), 0.0])
    first, last = np.eye(2)[[0, 0, 1, 1]], np.eye(2)[[1, 1, 0, 0]]
    endless = {"sizes": np.full(2, 1e6)}
    law = random_law(rng, 2, 2, forgetting=forgets, **endless)
    early, late = play(law, first), play(law, last)
    assert late[0] > early[0]
    assert late[1] == pytest.approx(early[1], rel=1e-8)
    at_end = [losses(law, memory, np.ones(1), np) for memory in (early, late)]
    assert (at_end[1] < at_end[0]).all()
    law = replace(law, forgetting=np.zeros(2))
    np.testing.assert_allclose(play(law, first), play(law, last), rtol=1e-8)


# --- losses ------------------------------------------------------------------------------------------------


def test_losses_by_hand(small):
    """b = (½, 1): at the start u = u₀ and the loss is 6; halfway half of u₀ is left; at the end none."""
    law = small(forgetting=(0.0,) * 3).parameters()
    np.testing.assert_allclose(law.start, [0.16 - FLOOR, 0.25 - FLOOR], rtol=1e-12)
    nothing, half, whole = np.zeros(3), np.array([0.25, 0.25, 0.0]), np.array([0.5, 0.5, 0.0])
    np.testing.assert_allclose(losses(law, nothing, np.zeros(1), np), [6.0, 6.0], rtol=1e-12)
    share = useful(law, half, np.array([0.5]), np)
    expected = [1e-4 + 0.5 * 0.1599 + 0.25 * 4 + 0.25, 1e-4 + 0.5 * 0.2499 + 0.25 * 0.5 + 0.25 * 2]
    np.testing.assert_allclose(share, expected, rtol=1e-12)
    np.testing.assert_allclose(losses(law, half, np.array([0.5]), np), [1 + 2 / share[0] ** 0.5, 2 + 1 / share[1]])
    np.testing.assert_allclose(losses(law, whole, np.ones(1), np), [1 + 2 / 2.5001**0.5, 2 + 1 / 1.2501], rtol=1e-12)


def test_pace_delays_learning_and_leaves_the_end_alone(small):
    memory = np.array([0.2, 0.2, 0.1])
    swift, slow = small().parameters(), small(pace=2.0).parameters()
    for time in (0.25, 0.5):
        assert (losses(slow, memory, np.array([time]), np) > losses(swift, memory, np.array([time]), np)).all()
        kept = useful(slow, memory, np.array([time]), np) - FLOOR - (1 - time) * slow.start
        np.testing.assert_allclose(kept, time**2 * slow.helps @ memory)
    np.testing.assert_array_equal(losses(slow, memory, np.ones(1), np), losses(swift, memory, np.ones(1), np))


@examples
@given(seeds, st.floats(0.05, 1.0), st.floats(0.0, 2.0))
def test_slopes_are_the_derivatives_of_the_losses(seed, time, pace):
    rng = np.random.default_rng(seed)
    law = random_law(rng, pace=np.array([pace]))
    memory, at = rng.uniform(0.05, 0.5, 4), np.array([time])
    steep = slopes(law, memory, at, np)
    assert steep.shape == (3, 4)
    width = 1e-5
    for domain in range(4):
        shift = width * np.eye(4)[domain]
        rise = losses(law, memory + shift, at, np) - losses(law, memory - shift, at, np)
        np.testing.assert_allclose(steep[:, domain], -rise / (2 * width), rtol=1e-4, atol=1e-8)


@examples
@given(seeds)
def test_more_of_a_domain_lowers_every_loss(seed):
    rng = np.random.default_rng(seed)
    law = random_law(rng)
    memory, more = rng.uniform(0, 1, 4), rng.uniform(0, 1, 4) * (rng.random(4) < 0.5)
    assert (losses(law, memory + more, np.ones(1), np) <= losses(law, memory, np.ones(1), np)).all()


# --- one source: batched, and in torch ----------------------------------------------------------------------


def as_tensors(law):
    return Parameters(**{field.name: torch.tensor(getattr(law, field.name)) for field in fields(Parameters)})


def test_a_batch_of_laws_is_those_laws():
    rng = np.random.default_rng(0)
    laws = [random_law(rng) for _ in range(5)]
    batch = Parameters(**{f.name: np.stack([getattr(law, f.name) for law in laws]) for f in fields(Parameters)})
    memory, epochs, weights = rng.uniform(0, 1, (5, 4)), rng.uniform(0, 3, (5, 4)), rng.dirichlet(np.ones(4), 5)
    times, duration = rng.uniform(0.1, 1, (5, 1)), rng.uniform(0.01, 0.1, (5, 1))
    after, later = learn(batch, memory, epochs, weights, duration, np)
    together = losses(batch, after, times, np), slopes(batch, after, times, np)
    for row, law in enumerate(laws):
        one, passes = learn(law, memory[row], epochs[row], weights[row], duration[row], np)
        np.testing.assert_allclose(after[row], one, rtol=1e-13)
        np.testing.assert_allclose(later[row], passes, rtol=1e-13)
        np.testing.assert_allclose(together[0][row], losses(law, one, times[row], np), rtol=1e-13)
        np.testing.assert_allclose(together[1][row], slopes(law, one, times[row], np), rtol=1e-13)


def test_torch_and_numpy_run_the_same_dynamics():
    rng = np.random.default_rng(1)
    law = random_law(rng, pace=np.array([0.5]))
    tensors, schedule = as_tensors(law), rng.dirichlet(np.ones(4), 30)
    memory, other = play(law, schedule), play(tensors, torch.tensor(schedule), torch)
    np.testing.assert_allclose(other.numpy(), memory, atol=1e-12)
    for time in (0.3, 1.0):
        at, there = np.array([time]), torch.tensor([time], dtype=torch.float64)
        np.testing.assert_allclose(losses(tensors, other, there, torch), losses(law, memory, at, np), atol=1e-12)
        np.testing.assert_allclose(slopes(tensors, other, there, torch), slopes(law, memory, at, np), rtol=1e-12)


def test_final_losses_can_be_differentiated_through_the_whole_run():
    """Gradient by torch against finite differences, with repetition and forgetting."""
    rng = np.random.default_rng(2)
    law = random_law(rng)
    tensors, schedule = as_tensors(law), rng.dirichlet(np.ones(4), 6)
    variable = torch.tensor(schedule, requires_grad=True)
    losses(tensors, play(tensors, variable, torch), torch.ones(1, dtype=torch.float64), torch).mean().backward()
    for step, domain in ((0, 0), (3, 2), (5, 1)):
        moved = []
        for sign in (1, -1):
            other = schedule.copy()
            other[step, domain] += sign * 1e-6
            moved.append(losses(law, play(law, other), np.ones(1), np).mean())
        assert variable.grad[step, domain].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-4, abs=1e-8)
