import math
import time

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.agents.baselines.scaling import Ado, fit_laws
from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.step_stats import StepStats
from toy import ToyTrainer

NAN = float("nan")
BATCH = 32


def started(num_domains=3, horizon=300, **options):
    mixer = make_mixer("ado", **options)
    mixer.start(ToyTrainer((1 / num_domains,) * num_domains, horizon=horizon).info)
    return mixer


def seen(mixer, step, losses, counts=None, **changes):
    """Let `mixer` see one step of 32 sequences under its own mixture."""
    weights = mixer.weights()
    counts = weights * BATCH if counts is None else np.array(counts, dtype=float)
    drawn = np.full(len(weights), step * BATCH / len(weights))
    values = {
        "step": step,
        "tokens": 1,
        "requested": weights,
        "realised": counts / counts.sum(),
        "counts": counts,
        "loss_tokens": counts,
        "losses": np.where(counts > 0, losses, NAN),
        "epochs": drawn,
        "drawn": drawn,
    }
    mixer.update(StepStats(**values | changes))
    return mixer.weights()


def law(step, irreducible, amplitude, exponent):
    """Loss after `step` steps, with the amplitude at step 17: the geometric middle of 300."""
    return irreducible + amplitude * (step / 17) ** -np.asarray(exponent)


PLANTED = {
    "irreducible": np.array([1.0, 2.0, 0.2]),
    "amplitude": np.array([2.0, 1.0, 3.0]),
    "exponent": [0.5, 0.3, 0.4],
}


# --- the fit -------------------------------------------------------------------------------------------------


def test_the_fit_finds_planted_laws():
    rng = np.random.default_rng(0)
    planted = np.stack([np.log(rng.uniform(5, 30, 22)), np.log(rng.uniform(0.3, 3, 22)), rng.uniform(0.2, 0.7, 22)], 1)
    log_n, weights = np.tile(np.linspace(5, 9, 48), (22, 1)), np.full((22, 48), 1 / 48)
    log_losses = np.logaddexp(planted[:, :1] - planted[:, 2:] * log_n, planted[:, 1:2])
    laws = fit_laws(log_n, log_losses, weights, np.full((22, 3), NAN))
    np.testing.assert_allclose(laws, planted, atol=0.02)
    np.testing.assert_allclose(fit_laws(log_n, log_losses, weights, laws), planted, atol=0.02)
    noisy = log_losses + rng.normal(0, 0.01, log_losses.shape)
    laws = fit_laws(log_n, noisy, weights, np.full((22, 3), NAN))
    speeds = [law[:, 2] * np.exp(law[:, 0] - 9 * law[:, 2]) for law in (laws, planted)]  # what the mixture depends on
    assert np.median(np.abs(speeds[0] / speeds[1] - 1)) < 0.1


def test_the_fit_does_not_see_an_outlier_and_a_point_of_weight_0():
    log_n = np.linspace(5, 9, 48)[None]
    log_losses = np.logaddexp(3 - 0.4 * log_n, 0.0)
    clean = fit_laws(log_n, log_losses, np.full((1, 48), 1 / 48), np.full((1, 3), NAN))
    spoiled, weights = log_losses.copy(), np.full((1, 48), 1 / 47)
    spoiled[0, 30] += 2.0  # Huber: an error of 2 pulls no more than one of 0.001
    spoiled[0, 10], weights[0, 10] = 50.0, 0.0
    np.testing.assert_allclose(fit_laws(log_n, spoiled, weights, np.full((1, 3), NAN)), clean, atol=0.03)


def test_the_released_floor_of_the_irreducible_loss_is_an_option():
    """Arithmetic can be learned to 0.1 nats; e ≥ 0.5 claims that 1.65 of them are noise."""
    losses = [law(step, 0.1, 2.0, 0.5) for step in range(1, 301)]
    fitted = {}
    for lowest in (None, 0.5):
        mixer = started(1, min_log_irreducible=lowest)
        for step, loss in enumerate(losses, start=1):
            seen(mixer, step, np.array([loss]))
        fitted[lowest] = float(np.exp(mixer.state_dict()["laws"][0, 1]))
    assert fitted[None] == pytest.approx(0.1, abs=0.03)
    assert fitted[0.5] == pytest.approx(math.exp(0.5))


# --- the rule ------------------------------------------------------------------------------------------------


def test_the_prior_holds_until_the_first_fit():
    """A fit every 15 steps of 300, over the steps from 5 on."""
    mixer = started(prior=[0.5, 0.3, 0.2])
    for step in range(1, 15):
        np.testing.assert_allclose(seen(mixer, step, law(step, **PLANTED)), [0.5, 0.3, 0.2])
    assert not np.allclose(seen(mixer, 15, law(15, **PLANTED)), [0.5, 0.3, 0.2], atol=1e-3)
    assert mixer.diagnostics() == {"fitted_frac": 1.0}


def test_one_step_of_the_rule_by_hand():
    mixer = started(prior=[0.5, 0.3, 0.2], min_weight=0.1)
    state = mixer.state_dict()
    log_n = math.log(31 * BATCH)
    # What the laws leave to learn at step 31, L − exp e, is 1, 2 and 0.01.
    alpha = np.array([0.5, 0.02, 0.1])
    state["laws"] = np.stack([np.log([1.0, 2.0, 0.01]) + alpha * log_n, np.zeros(3), alpha], axis=1)
    state["recent"], state["mean"] = np.array([0.4, 0.4, 0.2]), np.array([0.6, 0.3, 0.1])
    mixer.load_state_dict(state)
    weights = seen(mixer, 31, [9.0, 9.0, 9.0], counts=[16, 16, 0])

    recent = [0.9 * 0.4 + 0.05, 0.9 * 0.4 + 0.05, 0.9 * 0.2]  # 0.41, 0.41, 0.18
    speed = [0.5 * 1.0, 0.05 * 2.0, 0.1 * 0.01]  # the smallest exponent counts as 0.05
    score = np.array([0.5, 0.3, 0.2]) * np.sqrt(recent) * speed
    greedy = score / score.sum()  # 0.892…, 0.107…, 0.0005
    clipped = np.array([greedy[0], greedy[1], 0.1])
    greedy = clipped / clipped.sum()
    assert weights == pytest.approx(0.9 * np.array([0.6, 0.3, 0.1]) + 0.1 * greedy)
    after = mixer.state_dict()
    assert after["mean"] == pytest.approx(31 / 32 * np.array([0.6, 0.3, 0.1]) + greedy / 32)
    assert after["recent"] == pytest.approx(recent)


def test_what_still_falls_is_drawn_more():
    mixer = started(prior="uniform")
    falling = {"irreducible": np.array([3.0, 1.0, 3.0]), "amplitude": np.array([0.05, 3.0, 0.05]), "exponent": 0.5}
    for step in range(1, 301):
        weights = seen(mixer, step, law(step, **falling))
    assert weights[1] > 0.8
    assert weights.min() > 0.01


@pytest.mark.parametrize("num_domains", [2, 64, 256])
def test_the_floor_never_makes_it_uniform_for_ever(num_domains):
    mixer = started(num_domains, horizon=60, prior="uniform")
    amplitude = np.full(num_domains, 0.01)
    amplitude[0] = 5.0
    for step in range(1, 61):
        weights = seen(mixer, step, law(step, 1.0, amplitude, 0.5))
    assert weights[0] > 2 / num_domains or weights[0] > 0.9
    assert (weights > 0).all()


def test_the_default_prior_is_the_sizes():
    info = ToyTrainer((0.5, 0.5)).info
    mixer = Ado()
    mixer.start(type(info)(**{**vars(info), "sizes_tokens": (3000, 1000)}))
    assert mixer.weights() == pytest.approx([0.75, 0.25])


# --- gaps ----------------------------------------------------------------------------------------------------


def test_a_domain_without_enough_points_keeps_its_prior_share():
    mixer = started(prior=[0.5, 0.3, 0.2])
    for step in range(1, 31):
        losses = law(step, **PLANTED)
        losses[0] = NAN  # drawn, but without a finite loss
        counts = [10, 16, 6 if step in (7, 20) else 0]
        weights = seen(mixer, step, losses, counts)
    assert mixer.diagnostics() == {"fitted_frac": pytest.approx(1 / 3)}
    assert weights == pytest.approx([0.5, 0.3, 0.2])


def test_an_undrawn_domain_is_fitted_once_it_has_been_drawn():
    mixer = started(prior="uniform")
    for step in range(1, 301):
        seen(mixer, step, law(step, **PLANTED), [16, 16, 0] if step < 120 else None)
        if step == 119:
            assert mixer.diagnostics()["fitted_frac"] == pytest.approx(2 / 3)
    assert mixer.diagnostics()["fitted_frac"] == 1.0
    assert np.isfinite(mixer.weights()).all()


def test_a_diverged_step_changes_nothing():
    mixer = started()
    for step in range(1, 31):
        before = seen(mixer, step, law(step, **PLANTED))
    state = mixer.state_dict()
    np.testing.assert_array_equal(seen(mixer, 31, np.full(3, NAN), diverged=True), before)
    for name, value in mixer.state_dict().items():
        np.testing.assert_array_equal(value, state[name])


@pytest.mark.parametrize("losses", [[2.0, 2.0, 2.0], [1e-9, 30.0, 1e6]])
def test_20000_updates_with_constant_losses_stay_finite(losses):
    mixer = started(horizon=2000)  # and far beyond the horizon
    for step in range(1, 20_001):
        weights = seen(mixer, step, np.array(losses))
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert all(np.isfinite(value).all() for value in mixer.state_dict().values())


# --- state and cost ------------------------------------------------------------------------------------------


def test_saved_and_loaded_goes_on_exactly(tmp_path):
    whole, again = started(), started()
    for step in range(1, 41):
        seen(whole, step, law(step, **PLANTED))
    write_state(tmp_path / "state", whole.state_dict())
    again.load_state_dict(read_state(tmp_path / "state"))
    for step in range(41, 80):
        losses = law(step, **PLANTED)
        np.testing.assert_array_equal(seen(whole, step, losses), seen(again, step, losses))


def test_the_state_is_as_small_at_any_horizon():
    sizes = []
    for horizon in (300, 50_000):
        mixer = started(22, horizon=horizon)
        for step in range(1, 301):
            seen(mixer, step, np.linspace(2, 4, 22))
        sizes.append(sum(value.nbytes for value in mixer.state_dict().values()))
    assert sizes[0] == sizes[1] < 30_000


def test_instances_are_apart_a_new_run_forgets_and_arrays_are_fresh():
    one, other = started(), started()
    for step in range(1, 31):
        seen(one, step, law(step, **PLANTED))
    one.weights()[:] = 0
    assert one.weights().sum() == pytest.approx(1)
    assert other.weights() == pytest.approx(np.full(3, 1 / 3))
    one.start(other.info)
    assert one.weights() == pytest.approx(np.full(3, 1 / 3))


def test_an_update_costs_little_beside_a_training_step():
    """A tiny step takes about 70 ms of CPU time; 1 % of it, with room for a slow machine."""
    rng = np.random.default_rng(0)
    mixer = started(22)
    irreducible, exponent = rng.uniform(0.5, 3, 22), rng.uniform(0.2, 0.7, 22)
    losses = [law(step, irreducible, 2.0, exponent) + rng.normal(0, 0.05, 22) for step in range(1, 301)]
    started_at = time.thread_time()
    for step, loss in enumerate(losses, start=1):
        seen(mixer, step, loss)
    assert (time.thread_time() - started_at) / 300 < 3 * 0.7e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fits": 0}, "fits=0: must be at least 1"),
        ({"warmup_frac": 1.0}, r"warmup_frac=1\.0: must be in \[0, 1\)"),
        ({"min_weight": -0.1}, r"min_weight=-0\.1"),
        ({"min_log_irreducible": NAN}, "min_log_irreducible=nan: must be in"),
        ({"min_log_irreducible": 6}, "it is a logarithm of nats"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_mixer("ado", **options)


def test_a_prior_of_other_domains_is_refused():
    with pytest.raises(ConfigError, match="weights"):
        started(3, prior=[0.5, 0.5])
