"""The learner beyond one environment and its own experience: waves of array episodes, and a teacher before them."""

import numpy as np
import pytest
import torch

from acodm_env.agents.learning import Learner, Learning
from acodm_env.agents.sb3 import AgentRecipe
from acodm_env.agents.vector import ArrayVecEnv
from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.reward import RewardConfig
from acodm_env.surrogate.env import SurrogateEnv
from acodm_env.surrogate.vector import SurrogateVectorEnv
from toy import ToyTrainer

SMALL = AgentRecipe(hidden=(16,), batch_size=8, learning_starts=4, buffer_size=200)


def toy_env():
    return MixtureEnv(ToyTrainer((0.6, 0.3, 0.1), horizon=10), reward=RewardConfig(terms={"progress": 1.0}))


def weights_of(agent):
    return {name: p.detach().clone() for name, p in agent.policy.state_dict().items()}


@pytest.mark.parametrize("algo", ["td3", "ppo"])
def test_waves_of_array_episodes_resume_bit_for_bit(algo, tmp_path):
    """Four surrogates at a time, a checkpoint every wave; killed in the third wave of four."""

    def make(folder):
        many = lambda: ArrayVecEnv(SurrogateVectorEnv(4, episode_steps=6))  # noqa: E731
        learning = Learning(algo=algo, episodes=15, evaluate_every=8, checkpoint_every=4)
        return Learner(lambda: SurrogateEnv(episode_steps=6), learning, SMALL, folder, make_many=many)

    whole = make(tmp_path / "whole")
    whole.learn()
    assert [row["episode"] for row in whole.rows] == list(range(1, 17))  # waves are whole
    assert ["eval_objective" in row for row in whole.rows] == [index in (7, 15) for index in range(16)]
    assert whole.agent.num_timesteps == 16 * 6
    assert whole.steps == 0  # no optimiser step of a language model
    seen = []

    def kill(row):
        seen.append(row)
        if len(seen) == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut").learn(kill)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (SB3 draws from it)
    second = make(tmp_path / "cut")
    second.learn()
    resumed = weights_of(second.agent)
    for name, value in weights_of(whole.agent).items():
        assert torch.equal(value, resumed[name]), name
    assert [row["return"] for row in whole.rows] == [row["return"] for row in second.rows]


def test_array_episodes_are_the_same_after_a_reset_to_a_recorded_state():
    """And a seed gives the same ones to another object."""
    plain, env = (ArrayVecEnv(SurrogateVectorEnv(2, episode_steps=3)) for _ in range(2))
    action = np.full((2, 17), 0.3, dtype=np.float32)

    def play(venv):
        return [venv.step(action)[0] for _ in range(3)]

    for venv in (plain, env):
        venv.seed(5)
        venv.reset()
    (state, same) = env.env_method("episode_state")
    assert state == same
    first = play(env)  # the last step starts the next episodes
    np.testing.assert_array_equal(first, play(plain))
    assert env.env_method("episode_state")[0] != state
    env.env_method("load_episode_state", state)
    env.reset()
    np.testing.assert_array_equal(play(env), first)


def test_a_teacher_comes_before_the_first_episode_and_the_untrained_actor_before_the_teacher(tmp_path):
    learning = Learning(episodes=2, evaluate_every=0, teacher="odm-released", teacher_decisions=30)
    run = Learner(toy_env, learning, SMALL, tmp_path)
    initial = weights_of(run.agent)
    run.learn()
    assert run.warm_up["teacher"] == "odm-released"
    assert run.warm_up["decisions"] == 30
    assert run.agent.num_timesteps == 20
    assert run.agent.replay_buffer.size() == 50
    assert run.steps == 30 + 20 + 10  # teacher, episodes, one evaluation
    again = Learner(toy_env, learning, SMALL, tmp_path)
    again.load("last")
    assert again.warm_up == run.warm_up
    again.load_networks("initial")
    for name, value in weights_of(again.agent).items():
        assert torch.equal(value, initial[name]), name


@pytest.mark.parametrize(
    ("algo", "teacher", "message"),
    [
        ("td3", "odm-relesed", "did you mean 'odm-released'"),
        ("ppo", "uniform", "teacher=uniform: must be left out for PPO"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused_before_anything_is_written(algo, teacher, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Learner(toy_env, Learning(algo=algo, teacher=teacher), SMALL, tmp_path / "run")
    assert not (tmp_path / "run").exists()
