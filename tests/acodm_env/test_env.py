import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import ActionMap, Bounds
from acodm_env.reward import RewardConfig, parse_reward
from acodm_env.wrapper import Lagged
from toy import ToyTrainer


def toy_env(num_domains=3, lag=0, horizon=20, **options):
    trainer = ToyTrainer((1 / num_domains,) * num_domains, horizon=horizon, decision_every=4)
    return MixtureEnv(Lagged(trainer, lag) if lag else trainer, **options)


def play(env, seed=0):
    observation, info = env.reset(seed=seed)
    trace, done = [(observation, 0.0, info)], False
    rng = np.random.default_rng(1)
    while not done:
        observation, reward, terminated, truncated, info = env.step(
            rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        )
        trace.append((observation, reward, info))
        done = terminated or truncated
    return trace, terminated, truncated


@pytest.mark.parametrize("num_domains", [2, 8, 22])
@pytest.mark.parametrize("lag", [0, 3])
def test_both_checkers_pass_with_warnings_as_errors(num_domains, lag):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check(toy_env(num_domains, lag), skip_render_check=True)
        sb3_check(toy_env(num_domains, lag))


def test_observation_has_the_declared_layout_and_stays_in_bounds():
    env = toy_env(3)
    trace, terminated, truncated = play(env)
    assert env.observation_space.shape == (3 * 6 + 2 * 3 + 1,)
    assert all(env.observation_space.contains(observation) for observation, _, _ in trace)
    assert np.isfinite(env.observation_space.low).all()
    assert np.isfinite(env.observation_space.high).all()
    assert (terminated, truncated) == (False, True)
    assert len(trace) == 1 + 20 // 4


def test_first_observation_is_defined_before_any_draw():
    env = toy_env(2, fields=["loss", "delta_loss", "sample_share", "epochs", "layer_norm", "progress"])
    observation, info = env.reset(seed=0)
    expected = [5.0, 5.0, 0, 0, 0, 0, 0, 0, 0.1, 0.1, 0.1, 0.0]
    np.testing.assert_allclose(observation, expected, rtol=1e-6)
    np.testing.assert_allclose(info["weights"], [0.5, 0.5])


def test_delta_is_against_the_previous_decision_not_the_first():
    env = toy_env(2, fields=["delta_loss"])
    env.reset(seed=0)
    first, *_ = env.step(np.zeros(2, dtype=np.float32))
    second, *_ = env.step(np.zeros(2, dtype=np.float32))
    np.testing.assert_allclose(first, [1 - 5, 2 - 5], atol=0.02)  # losses are 1 and 2, initially 5
    np.testing.assert_allclose(second, [0, 0], atol=1e-6)


def test_reset_with_a_seed_repeats_the_episode_and_without_one_goes_on():
    env = toy_env()
    first, again = play(env, seed=3)[0], play(env, seed=3)[0]
    for (o1, r1, i1), (o2, r2, i2) in zip(first, again, strict=True):
        np.testing.assert_array_equal(o1, o2)
        assert r1 == r2
        assert i1.keys() == i2.keys()
    other = play(env, seed=None)[0]
    assert any((o1 != o2).any() for (o1, *_), (o2, *_) in zip(first, other, strict=True))


def test_info_is_flat_finite_and_has_the_same_keys_every_step():
    trace, *_ = play(toy_env())
    keys = trace[0][2].keys()
    assert "domain_rewards" in keys
    for _, reward, info in trace:
        assert isinstance(reward, float)
        assert info.keys() == keys
        for value in info.values():
            assert type(value) is float or (isinstance(value, np.ndarray) and value.dtype == np.float64)
            assert np.isfinite(value).all()


def test_divergence_terminates_with_a_finite_penalty():
    env = MixtureEnv(ToyTrainer((0.5, 0.5), horizon=20, decision_every=4, diverge_at=6))
    trace, terminated, truncated = play(env)
    assert (terminated, truncated) == (True, False)
    assert trace[-1][1] == -10.0
    assert np.isfinite(trace[-1][0]).all()
    assert len(trace) == 3


def test_interaction_reward_by_hand():
    """Two domains with fixed gradients (1,0) and (3,4): H_12 = 3, tr(H)/2 = 13 from the window before."""
    env = MixtureEnv(
        ToyTrainer((0.5, 0.5), horizon=3), interaction=InteractionConfig(smoothing=0.5, scale_smoothing=0.0)
    )
    env.reset(seed=0)
    env.trainer.gradients = np.array([[1.0, 0, 0, 0], [3.0, 4, 0, 0]])
    action = np.zeros(2, dtype=np.float32)
    _, first, _, _, _ = env.step(action)
    _, second, _, _, info = env.step(action)
    _, third, _, _, _ = env.step(action)
    assert first == 0.0  # no past window, no scale
    assert second == pytest.approx(0.5 * 3 / 13)
    assert third == pytest.approx(0.75 * 3 / 13)
    np.testing.assert_allclose(info["domain_rewards"], [0.5 * 3 / 13] * 2)


def test_progress_and_final_rewards_by_hand():
    env = MixtureEnv(ToyTrainer((0.5, 0.5), horizon=2), reward=RewardConfig(terms={"progress": 2.0, "final": 1.0}))
    env.reset(seed=0)
    _, first, _, _, info = env.step(np.zeros(2, dtype=np.float32))
    _, last, _, truncated, _ = env.step(np.zeros(2, dtype=np.float32))
    assert first == pytest.approx(2 * 0.1)
    assert last == pytest.approx(2 * 0.1 - 4.8)
    assert truncated
    np.testing.assert_array_equal(info["domain_rewards"], [0, 0])


def test_progress_over_uniform_is_zero_for_the_uniform_mixture():
    reward = RewardConfig(terms={"progress": 1.0}, progress_over_uniform=True)
    env = MixtureEnv(ToyTrainer((0.9, 0.1), horizon=8, decision_every=4), reward=reward)
    env.reset(seed=0)
    _, same, *_ = env.step(np.zeros(2, dtype=np.float32))
    _, better, *_ = env.step(np.array([1.0, -1.0], dtype=np.float32))
    assert same == pytest.approx(0.0, abs=1e-12)
    assert better > 0


def test_importance_weighting_cancels_the_action_from_the_scalar():
    def rewards(action):
        env = MixtureEnv(
            ToyTrainer((0.5, 0.5), horizon=4),
            interaction=InteractionConfig(importance_weighted=True, smoothing=0.0),
        )
        env.reset(seed=0)
        return [env.step(np.array(action, dtype=np.float32))[1] for _ in range(3)]

    np.testing.assert_allclose(rewards([0.0, 0.0]), rewards([0.2, -0.2]))


def test_realised_follows_requested():
    """The released code forces one micro-batch of every domain: a hidden floor of 15 %."""
    env = toy_env(2, action=ActionMap(scale=2.0, floor=0.0))
    env.reset(seed=0)
    *_, info = env.step(np.array([1.0, -1.0], dtype=np.float32))
    np.testing.assert_allclose(info["realised"], info["weights"], atol=1e-12)
    assert info["weights"][1] == pytest.approx(1 / (1 + np.e**4))


def test_lag_delays_the_mixture_and_shows_what_is_pending():
    env = MixtureEnv(Lagged(ToyTrainer((0.5, 0.5), horizon=4), 2), fields=["pending"])
    env.reset(seed=0)
    tilted = np.array([1.0, -1.0], dtype=np.float32)
    observation, _, _, _, info = env.step(tilted)
    np.testing.assert_allclose(info["realised"], [0.5, 0.5])
    np.testing.assert_allclose(observation, [0.5, 0.5, *info["weights"]], rtol=1e-6)
    env.step(tilted)
    *_, info = env.step(tilted)
    np.testing.assert_allclose(info["realised"], info["weights"])
    assert info["mixture_age"] == 2.0


def test_epoch_cap_takes_a_spent_domain_out():
    env = MixtureEnv(ToyTrainer((0.5, 0.5), horizon=40), action=ActionMap(floor=0.0), bounds=Bounds(max_epochs=0.2))
    env.reset(seed=0)
    action = np.array([1.0, -1.0], dtype=np.float32)
    weights = [env.step(action)[4]["weights"] for _ in range(7)]
    assert weights[0][0] > 0.9
    np.testing.assert_allclose(weights[-1], [0, 1], atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": ["los"]}, "did you mean 'loss'"),
        ({"bounds": Bounds(minimum=(0.9, 0.9, 0.9))}, "no mixture fits"),
        ({"render_mode": "human"}, "render_mode=human"),
        ({"reward": RewardConfig(objective={"domain9": 1.0})}, "objective='domain9'"),
    ],
)
def test_bad_settings_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        toy_env(3, **options)


def test_bad_reward_is_refused_by_name():
    with pytest.raises(ConfigError, match="did you mean 'interaction'"):
        parse_reward("interactoin")
    with pytest.raises(ConfigError, match="finite"):
        parse_reward({"progress": float("nan")})


def test_render_text_and_picture():
    env = toy_env(3, render_mode="ansi")
    play(env)
    text = env.render()
    assert "step 20/20" in text
    assert "domain2" in text
    env = toy_env(3, render_mode="rgb_array")
    play(env)
    picture = env.render()
    assert picture.dtype == np.uint8
    assert picture.shape == (400, 800, 3)
    assert picture.std() > 10


def test_registered_spec_is_json():
    spec = gym.spec("acodm/ProxyPretrain-v0")
    assert json.loads(spec.to_json())["id"] == "acodm/ProxyPretrain-v0"
