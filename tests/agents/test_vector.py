"""The arrays as SB3 sees them."""

import time

import numpy as np
import pytest
from stable_baselines3 import TD3
from stable_baselines3.common.vec_env import VecNormalize

from acodm_env.agents.vector import ArrayVecEnv
from acodm_env.surrogate.vector import SurrogateVectorEnv


def make(num_envs=3, **settings):
    return ArrayVecEnv(SurrogateVectorEnv(num_envs, **{"episode_steps": 4, **settings}))


def test_the_step_that_ends_an_episode_returns_the_next_ones_first_observation():
    venv, core = make(), SurrogateVectorEnv(3, episode_steps=4)
    venv.seed(0)
    first = venv.reset()
    expected, _ = core.reset(seed=0)
    np.testing.assert_array_equal(first, expected)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 3, 17)).astype(np.float32)
    total = np.zeros(3)
    for index, action in enumerate(actions):
        observation, reward, done, infos = venv.step(action)
        expected, expected_reward, _, truncated, _ = core.step(action)
        np.testing.assert_array_equal(reward, expected_reward)
        np.testing.assert_array_equal(done, truncated)
        total += reward
        if index < 3:
            np.testing.assert_array_equal(observation, expected)
    assert done.all()
    for i in range(3):
        np.testing.assert_array_equal(infos[i]["terminal_observation"], expected[i])
        assert infos[i]["episode"] == {"r": pytest.approx(total[i], rel=1e-6), "l": 4, "t": 0.0}
        assert infos[i]["TimeLimit.truncated"] is False
    assert observation[0, -1] == 0.0  # progress: a new episode


def test_infos_are_each_episodes_own():
    venv = make(reward="interaction")
    venv.reset()
    for _ in range(3):
        _, reward, _, infos = venv.step(np.random.default_rng(1).uniform(-1, 1, (3, 17)))
    for i in range(3):
        assert infos[i]["weights"].shape == infos[i]["domain_rewards"].shape == (17,)
        assert infos[i]["weights"].sum() == pytest.approx(1, abs=1e-5)
        assert reward[i] == pytest.approx(float(infos[i]["weights"] @ infos[i]["domain_rewards"]), rel=1e-4)


def test_attributes_are_there_once_per_episode():
    venv = make(2)
    assert [trainer.info.horizon for trainer in venv.get_attr("trainer")] == [4, 4]
    assert venv.get_attr("trainer", 0)[0].info.num_domains == 17
    assert venv.env_is_wrapped(object) == [False, False]  # type: ignore[arg-type]


@pytest.mark.slow
def test_td3_spends_less_than_a_fifth_of_its_time_in_the_environment():
    """`pytest -m slow -s -k fifth tests/agents/test_vector.py` prints the share."""
    shares = []
    for _ in range(3):
        venv = make(64, episode_steps=40)
        spent = 0.0
        inner = venv.step_wait

        def timed(inner=inner):
            nonlocal spent
            started = time.perf_counter()
            try:
                return inner()
            finally:
                spent += time.perf_counter() - started

        venv.step_wait = timed  # type: ignore[method-assign]
        agent = TD3("MlpPolicy", VecNormalize(venv), learning_starts=640, gradient_steps=4, batch_size=256, seed=0)
        started = time.perf_counter()
        agent.learn(64 * 150)
        shares.append(spent / (time.perf_counter() - started))
    print(f"share of TD3's wall time in the environment: {np.median(shares):.1%}")  # noqa: T201
    assert np.median(shares) < 0.2
