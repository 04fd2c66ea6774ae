import math

import numpy as np
import pytest

from acodm_env.agents.baselines import make_mixer
from acodm_env.agents.baselines.bandits import exploration_rate
from acodm_env.errors import ConfigError
from acodm_env.files import read_state, write_state
from acodm_env.step_stats import StepStats
from acodm_env.trainer import drive
from acodm_env.wrapper import Lagged
from toy import ToyTrainer

RESCALED = ("odm-paper-rescaled", "odm-released-rescaled")
BANDITS = ("odm-paper", "odm-released", *RESCALED, "exp3", "exp3-classical")
LOSSES_22 = np.linspace(2.0, 3.68, 22)


def started(name, num_domains, horizon=5000, **options):
    """A mixer at its first step; without the warm-up of ODM unless asked for."""
    options = options if name.startswith("exp3") else {"warmup_frac": 0.0} | options
    mixer = make_mixer(name, **options)
    mixer.start(ToyTrainer((1 / num_domains,) * num_domains, horizon=horizon).info)
    return mixer


def seen(mixer, losses, counts=None, requested=None, diverged=False):
    """Let `mixer` see one step under its own weights; every domain is drawn unless `counts` says otherwise."""
    losses = np.array(losses, dtype=float)
    counts = np.ones(len(losses)) if counts is None else np.array(counts, dtype=float)
    mixer.update(
        StepStats(
            step=1,
            tokens=1,
            requested=mixer.weights() if requested is None else np.array(requested),
            realised=counts / counts.sum(),
            counts=counts,
            loss_tokens=counts,
            losses=losses,
            epochs=counts,
            drawn=counts,
            diverged=diverged,
        )
    )
    return mixer.weights()


# --- the rules, by hand and against golden numbers ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lowest", "highest"), [("odm-released", 0.0206, 0.0873), ("odm-paper", 0.0424, 0.0485)]
)
def test_golden_span_after_5000_steps_of_fixed_losses(name, lowest, highest):
    mixer = started(name, 22)
    for _ in range(5000):
        weights = seen(mixer, LOSSES_22)
    assert round(weights.min(), 4) == lowest
    assert round(weights.max(), 4) == highest
    assert (np.diff(weights) > 0).all()
    assert mixer.exploration() == pytest.approx(0.117, abs=5e-4)


def test_golden_exploration():
    rates = {t: 22 * exploration_rate(t, 22) for t in (300, 834, 5000, 41_667)}
    assert rates == pytest.approx({300: 0.48, 834: 0.286, 5000: 0.117, 41_667: 0.040}, abs=5e-3)
    assert rates[834] == pytest.approx(0.2855, abs=1e-4)
    assert exploration_rate(0, 22) == 1 / 22


@pytest.mark.parametrize("num_domains", [2, 22, 64, 256])
def test_exploration_is_at_most_everything_and_falls_after_k_ln_k(num_domains):
    turn = num_domains * math.log(num_domains)
    for t in range(int(3 * turn) + 2):
        share = num_domains * exploration_rate(t, num_domains)
        assert share <= 1
        assert (share < 1) == (t > turn)


@pytest.mark.parametrize("name", ["odm-paper", "odm-released"])
def test_22_domains_are_uniform_until_step_68(name):
    mixer = started(name, 22)
    for _ in range(68):
        np.testing.assert_allclose(seen(mixer, LOSSES_22), 1 / 22, rtol=1e-12)
    assert seen(mixer, LOSSES_22)[-1] > 1 / 22 + 1e-4


def test_odm_released_by_hand():
    mixer = started("odm-released", 2)
    e = math.e
    assert seen(mixer, [1.0, 2.0]) == pytest.approx([0.5, 0.5])  # K·ε_1 = 2·min(1/2, √(ln 2 / 2) = 0.589) = 1
    assert mixer.rewards == pytest.approx([0.5 * e, 0.5 * e**2])
    weights = seen(mixer, [1.0, 2.0])  # ε_2 = √(ln 2 / 4) = 0.416277, R ∝ (e, e²), so R_0 / ΣR = 1/(1 + e) = 0.268941
    assert mixer.rewards == pytest.approx([0.75 * e, 0.75 * e**2])
    assert weights == pytest.approx([0.167446 * 0.268941 + 0.416277, 0.167446 * 0.731059 + 0.416277], abs=1e-6)


def test_odm_paper_by_hand():
    mixer = started("odm-paper", 2)
    assert seen(mixer, [1.0, 2.0]) == pytest.approx([0.5, 0.5])
    assert mixer.rewards == pytest.approx([0.1 * 1 / 0.5, 0.1 * 2 / 0.5])  # 0.2, 0.4
    weights = seen(mixer, [1.0, 2.0])
    assert mixer.rewards == pytest.approx([0.9 * 0.2 + 0.2, 0.9 * 0.4 + 0.4])  # 0.38, 0.76
    greedy = 1 / (1 + math.exp(0.5 * (0.76 - 0.38)))  # ε_1 = 1/2
    assert weights[0] == pytest.approx(0.167446 * greedy + 0.416277, abs=1e-6)
    seen(mixer, [1.0, 2.0])
    assert mixer.rewards == pytest.approx([0.9 * 0.38 + 0.1 / weights[0], 0.9 * 0.76 + 0.2 / weights[1]])


def test_exp3_by_hand():
    mixer = started("exp3", 2)
    first = seen(mixer, [1.0, 2.0])  # ε_1 = 1/2: still uniform; R = (0.1, 0.2)/0.5
    np.testing.assert_allclose(first, [0.5, 0.5])
    second = seen(mixer, [1.0, 2.0])  # R = (0.4, 0.8), ε_1 = 1/2, ε_2 = √(ln 2/4)
    epsilon = math.sqrt(math.log(2) / 4)
    assert second[0] == pytest.approx((1 - 2 * epsilon) / (1 + math.exp(0.5 * 0.4)) + epsilon)
    assert mixer.exploration() == pytest.approx(2 * epsilon)


def test_classical_exp3_by_hand():
    mixer = started("exp3-classical", 2)
    first = seen(mixer, [1.0, 2.0])  # g·r/(w K) = 0.1·(0.1, 0.2)/(0.5·2) = 0.01, 0.02
    assert first[0] == pytest.approx(0.9 / (1 + math.exp(0.01)) + 0.05)
    second = seen(mixer, [1.0, 2.0])
    gap = 0.01 + 0.1 * (0.2 / first[1] - 0.1 / first[0]) / 2
    assert second[0] == pytest.approx(0.9 / (1 + math.exp(gap)) + 0.05)
    assert mixer.exploration() == 0.1


def test_steady_state_of_odm_released_follows_perplexity():
    mixer = started("odm-released", 3)
    losses = np.array([1.0, 2.0, 4.0])
    for _ in range(20_000):
        weights = seen(mixer, losses)
    share = mixer.exploration()
    expected = (1 - share) * np.exp(losses) / np.exp(losses).sum() + share / 3
    np.testing.assert_allclose(weights, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["odm-paper", "odm-released"])
def test_warm_up_holds_uniform_weights_while_rewards_are_learned(name):
    mixer = started(name, 2, horizon=200, warmup_frac=0.02)
    plain = started(name, 2, horizon=200)
    for _ in range(4):  # 2 % of 200
        assert seen(mixer, [1.0, 3.0], requested=[0.5, 0.5]) == pytest.approx([0.5, 0.5])
        after = seen(plain, [1.0, 3.0], requested=[0.5, 0.5])
    assert after[1] > 0.5
    assert mixer.rewards == pytest.approx(plain.rewards)
    assert seen(mixer, [1.0, 3.0])[1] > 0.5


def test_both_odm_warm_up_for_two_per_cent_unless_told_otherwise():
    assert [make_mixer(name).warmup_frac for name in ("odm-paper", "odm-released")] == [0.02, 0.02]
    assert [make_mixer(name).smoothing for name in ("odm-paper", "odm-released")] == [0.9, 0.5]


@pytest.mark.parametrize("name", RESCALED)
def test_rescaled_at_the_published_horizon_equals_the_plain_rule_exactly(name):
    rescaled = started(name, 5, horizon=41_667)
    plain = started(name.removesuffix("-rescaled"), 5, horizon=41_667)
    for losses in np.random.default_rng(0).uniform(1, 6, size=(200, 5)):
        np.testing.assert_array_equal(seen(rescaled, losses), seen(plain, losses))
        assert rescaled.exploration() == plain.exploration()


@pytest.mark.parametrize("name", RESCALED)
@pytest.mark.parametrize("horizon", [300, 5000])
def test_rescaled_ends_with_the_published_exploration_at_any_horizon(name, horizon):
    mixer, plain = (started(form, 22, horizon=horizon) for form in (name, name.removesuffix("-rescaled")))
    mixer.updates = plain.updates = horizon
    assert mixer.diagnostics()["exploration"] == pytest.approx(22 * exploration_rate(41_667, 22))
    assert mixer.diagnostics()["exploration"] == pytest.approx(0.040, abs=5e-4)
    assert plain.diagnostics()["exploration"] == pytest.approx({300: 0.476, 5000: 0.117}[horizon], abs=5e-4)


def test_rescaled_by_hand():
    mixer = started("odm-paper-rescaled", 2, horizon=100, reference_horizon=400)  # update t counts as 4t
    first = seen(mixer, [1.0, 2.0])  # R = (0.2, 0.4), ε_0 = 1/2, ε at 4 = √(ln 2 / 8)
    epsilon = math.sqrt(math.log(2) / 8)
    assert first[0] == pytest.approx((1 - 2 * epsilon) / (1 + math.exp(0.5 * 0.2)) + epsilon)
    rewards = [0.9 * 0.2 + 0.1 / first[0], 0.9 * 0.4 + 0.2 / first[1]]
    now = math.sqrt(math.log(2) / 16)
    second = seen(mixer, [1.0, 2.0])
    assert second[0] == pytest.approx((1 - 2 * now) / (1 + math.exp(epsilon * (rewards[1] - rewards[0]))) + now)


@pytest.mark.parametrize("name", RESCALED)
def test_rescaled_holds_its_warm_up_by_the_plain_step(name):
    mixer = started(name, 2, horizon=200, warmup_frac=0.02)
    for _ in range(4):
        assert seen(mixer, [1.0, 3.0]) == pytest.approx([0.5, 0.5])
    assert seen(mixer, [1.0, 3.0])[1] > 0.5


@pytest.mark.parametrize("name", RESCALED)
@pytest.mark.parametrize("num_domains", [2, 22, 64, 256])
def test_rescaled_exploration_is_at_most_everything_and_falls_after_k_ln_k(name, num_domains):
    mixer = started(name, num_domains, horizon=300)
    turn = num_domains * math.log(num_domains)
    for t in range(301):
        mixer.updates = t
        assert mixer.exploration() <= 1
        assert (mixer.exploration() < 1) == (t * 41_667 / 300 > turn)


# --- the traps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [3.0, 1000.0])
@pytest.mark.parametrize("name", BANDITS)
def test_20000_updates_with_a_constant_reward_stay_finite(name, loss):
    mixer = started(name, 3, horizon=20_000)
    for _ in range(20_000):
        weights = seen(mixer, [loss, loss, 0.5 * loss])
    assert np.isfinite(mixer.rewards).all()
    assert (weights > 0).all()
    assert weights.sum() == pytest.approx(1.0)


def test_unseen_domain_has_exactly_epsilon():
    mixer = started("odm-released", 3)
    for _ in range(50):
        weights = seen(mixer, [2.0, 3.0, np.nan], counts=[5, 5, 0])
    assert mixer.rewards[2] == 0.0
    assert weights[2] == pytest.approx(exploration_rate(50, 3), rel=1e-14)


@pytest.mark.parametrize("name", BANDITS)
def test_nothing_seen_at_all_is_uniform(name):
    mixer = started(name, 3)
    for _ in range(30):
        weights = seen(mixer, [np.nan] * 3)
    assert weights == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["odm-paper", "odm-released"])
def test_a_domain_without_a_finite_loss_keeps_its_estimate(name, bad):
    mixer = started(name, 3)
    seen(mixer, [2.0, 3.0, 4.0])
    before = mixer.rewards.copy()
    seen(mixer, [2.0, 3.0, bad])
    assert mixer.rewards[2] == before[2]
    assert (mixer.rewards[:2] > before[:2]).all()
    assert mixer.updates == 2


def test_classical_exp3_credits_nothing_to_a_domain_without_a_finite_loss():
    mixer = started("exp3-classical", 3)
    seen(mixer, [2.0, np.nan, np.inf])
    log_v = mixer.rewards - mixer.rewards[1]
    assert log_v == pytest.approx([0.02, 0.0, 0.0])  # 0.1·0.2/(1/3·3)


@pytest.mark.parametrize("name", BANDITS)
def test_a_diverged_step_teaches_nothing(name):
    mixer = started(name, 2)
    seen(mixer, [2.0, 3.0])
    before = mixer.rewards.copy()
    seen(mixer, [2.0, 9.0], diverged=True)
    np.testing.assert_array_equal(mixer.rewards, before)
    assert mixer.updates == 2


@pytest.mark.parametrize("name", BANDITS)
def test_a_domain_drawn_with_zero_weight_does_not_explode(name):
    mixer = started(name, 2)
    for _ in range(10):
        weights = seen(mixer, [2.0, 3.0], requested=[1.0, 0.0])
    assert mixer.rewards.max() <= 1e3
    assert (weights > 0).all()


@pytest.mark.parametrize("name", BANDITS)
def test_two_mixers_in_one_process_are_independent(name):
    one, other, alone = (started(name, 2) for _ in range(3))
    for _ in range(20):
        seen(one, [1.0, 5.0])
        seen(other, [5.0, 1.0])
        seen(alone, [5.0, 1.0])
    np.testing.assert_array_equal(other.weights(), alone.weights())
    assert one.weights()[1] > 0.5 > other.weights()[1]


@pytest.mark.parametrize("name", BANDITS)
def test_start_forgets_and_weights_are_the_callers_own(name):
    mixer = started(name, 2)
    fresh = mixer.weights()
    for _ in range(5):
        seen(mixer, [1.0, 5.0])
    mixer.weights()[:] = 7.0
    assert mixer.weights().sum() == pytest.approx(1.0)
    mixer.start(mixer.info)
    np.testing.assert_array_equal(mixer.weights(), fresh)


@pytest.mark.parametrize("name", BANDITS)
def test_saved_and_loaded_equals_uninterrupted(name, tmp_path):
    rng = np.random.default_rng(0)
    losses = rng.uniform(1, 6, size=(40, 5))
    options = {} if name.startswith("exp3") else {"warmup_frac": 0.02}
    through = started(name, 5, horizon=500, **options)
    expected = [seen(through, row) for row in losses]
    first, second = (started(name, 5, horizon=500, **options) for _ in "ab")
    for row in losses[:17]:
        seen(first, row)
    write_state(tmp_path / "mixer.safetensors", first.state_dict())
    seen(first, losses[0])  # the saved state is a copy
    second.load_state_dict(read_state(tmp_path / "mixer.safetensors"))
    for row, weights in zip(losses[17:], expected[17:], strict=True):
        np.testing.assert_array_equal(seen(second, row), weights)


def test_importance_weight_is_that_of_the_draw_under_a_lag():
    trainer = Lagged(ToyTrainer((0.5, 0.5)), lag=2)
    trainer.reset(np.random.default_rng(0))
    mixer = make_mixer("odm-paper", warmup_frac=0.0)
    mixer.start(trainer.info)
    rewards = np.zeros(2)
    for stats in drive(trainer, mixer, 12):
        rewards = 0.9 * rewards + 0.1 * stats.losses / stats.requested
        np.testing.assert_allclose(mixer.rewards, rewards, rtol=1e-12)
    assert np.abs(stats.requested - mixer.weights()).max() > 1e-3


def test_one_domain_is_a_mixture_too():
    for name in BANDITS:
        mixer = started(name, 1)
        assert [seen(mixer, [3.0]).tolist() for _ in range(3)] == [[1.0]] * 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("odm-paper", {"smoothing": 1.0}),
        ("odm-released", {"smoothing": math.nan}),
        ("odm-released", {"warmup_frac": -0.1}),
        ("odm-paper-rescaled", {"reference_horizon": 0}),
        ("odm-released-rescaled", {"reference_horizon": -1}),
        ("exp3-classical", {"exploration": 0.0}),
        ("exp3", {"loss_scale": 0.0}),
    ],
)
def test_bad_options_are_refused_by_name(name, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_mixer(name, **options)


def test_bandits_need_losses():
    trainer = ToyTrainer((0.5, 0.5))
    trainer.provides = frozenset({"validation"})
    trainer.reset(np.random.default_rng(0))
    mixer = started("exp3", 2)
    with pytest.raises(ConfigError, match="exp3: needs losses; ToyTrainer"):
        next(drive(trainer, mixer, 1))
