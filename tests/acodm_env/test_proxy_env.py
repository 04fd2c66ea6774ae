"""The real environment, a language model on a token store, on a tiny scale."""

import pickle
import random
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import acodm_env  # noqa: F401 (registers the environment)
from acodm_env.errors import ConfigError, DataError

ID = "acodm/ProxyPretrain-v0"


@pytest.fixture
def options(tiny_corpus):
    return {
        "corpus": str(tiny_corpus),
        "episode_steps": 6,
        "steps_per_action": 2,
        "device": "cpu",
        "lm": {"batch_size": 6, "sequence_length": 32},
    }


def test_both_checkers_pass_with_warnings_as_errors(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check(gym.make(ID, **options, render_mode="ansi").unwrapped)
        sb3_check(gym.make(ID, **options).unwrapped)


def rollout(env, seed):
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=seed)
    trace, done = [observation], False
    while not done:
        observation, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, 3).astype(np.float32))
        trace.append(np.concatenate([observation, [reward], info["domain_rewards"]]))
        done = terminated or truncated
    return trace


def test_same_seed_is_bit_identical_and_global_generators_are_untouched(options):
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    env = gym.make(ID, **options)
    first, second, other = rollout(env, 1), rollout(env, 1), rollout(env, 2)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_interaction_reward_is_alive(options):
    trace = rollout(gym.make(ID, **options), 0)
    assert any(np.abs(entry[-4:]).max() > 0 for entry in trace[2:])


def test_it_pickles(options):
    env = gym.make(ID, **options)
    copy = pickle.loads(pickle.dumps(env.unwrapped))
    np.testing.assert_array_equal(rollout(env, 3)[-1], rollout(copy, 3)[-1])


def test_vectorised_by_gymnasium_and_by_sb3(options):
    envs = gym.make_vec(ID, num_envs=2, vectorization_mode="sync", **options)
    observations, _ = envs.reset(seed=0)
    _, rewards, *_, infos = envs.step(np.zeros((2, 3), dtype=np.float32))
    assert observations.shape[0] == 2
    assert infos["domain_rewards"].shape == (2, 3)
    assert np.isfinite(rewards).all()
    envs.close()
    venv = DummyVecEnv([lambda: gym.make(ID, **options)] * 2)
    venv.reset()
    assert venv.step(np.zeros((2, 3), dtype=np.float32))[0].shape[0] == 2


def test_subprocesses(options):
    venv = SubprocVecEnv([lambda: gym.make("acodm_env:acodm/ProxyPretrain-v0", **options)] * 2, start_method="spawn")
    try:
        venv.seed(0)
        venv.reset()
        observations, _, _, _ = venv.step(np.zeros((2, 3), dtype=np.float32))
        assert np.isfinite(observations).all()
    finally:
        venv.close()


def test_lag_hides_nothing_that_a_reset_adds(options):
    plain, lagged = (gym.make(ID, **options, lag=lag, fields=["layer_norm"]) for lag in (0, 2))
    first, second = plain.reset(seed=0)[0], lagged.reset(seed=0)[0]
    np.testing.assert_array_equal(first, second)
    assert (first > 0).all()


def test_progress_reward_lag_and_named_fields(options):
    env = gym.make(ID, **options, reward={"progress": 1.0, "final": 0.5}, lag=1, fields=["loss", "pending"])
    env.reset(seed=0)
    total = 0.0
    for _ in range(3):
        _, reward, _, truncated, info = env.step(np.zeros(3, dtype=np.float32))
        total += reward
    assert truncated
    drop = info["reward_progress"]
    assert np.isfinite(drop)
    assert info["reward_final"] == pytest.approx(-0.5 * info["objective"])
    assert info["mixture_age"] == 1.0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"proxy": "tinny"}, ConfigError, "did you mean 'tiny'"),
        ({"fields": ["los"]}, ConfigError, "did you mean 'loss'"),
        ({"reward": "progres"}, ConfigError, "did you mean 'progress'"),
        ({"lm": {"batch_sise": 3}}, ConfigError, "did you mean 'batch_size'"),
        ({"action": {"floor": 2}}, ConfigError, "floor=2"),
        ({"corpus": "nowhere"}, DataError, "nowhere"),
        ({"lag": -1}, ConfigError, "lag=-1"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, changes, error, message):
    with pytest.raises(error, match=message):
        gym.make(ID, **options | changes).reset(seed=0)
