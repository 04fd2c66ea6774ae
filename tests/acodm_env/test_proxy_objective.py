"""The proxy environment plays for the user's objective: rewards are the number that tables report."""

import gymnasium as gym
import numpy as np
import pytest

import acodm_env  # noqa: F401 (registers the environments)
from acodm_env.errors import ConfigError

ID = "acodm/ProxyPretrain-v0"


@pytest.fixture
def options(tiny_corpus):
    return {
        "corpus": str(tiny_corpus),
        "episode_steps": 4,
        "steps_per_action": 2,
        "fields": ["loss"],
        "lm": {"batch_size": 6, "sequence_length": 32, "eval_sequences": 4},
        "disable_env_checker": True,
    }


def episode(env, seed=0):
    """Rewards of an episode under the even mixture, and the environment behind the wrappers."""
    env.reset(seed=seed)
    rewards, ended = [], False
    while not ended:
        _, reward, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, dtype=np.float32))
        rewards.append(reward)
        ended = terminated or truncated
    return rewards, info, env.unwrapped


def test_final_is_minus_the_log_mean_perplexity_of_the_targets(options):
    settings = {"objective": "perplexity", "targets": {"verbs": 3, "letters": 1}, "reward": "final"}
    rewards, info, env = episode(gym.make(ID, **options, **settings))
    losses = env.trainer.evaluate("validation")  # of letters and verbs, in the corpus's order
    expected = np.log(0.25 * np.exp(losses[0]) + 0.75 * np.exp(losses[1]))
    assert env.trainer.info.targets == ("letters", "verbs")
    assert rewards == [0.0, pytest.approx(-expected)]
    assert info["objective"] == pytest.approx(env.trainer.info.judge(losses))


def test_progress_is_the_drop_of_a_target_that_is_not_trained_on(options):
    settings = {"domains": "letters,numbers", "targets": "verbs", "reward": "progress"}
    env = gym.make(ID, **options, **settings)
    assert env.action_space.shape == (2,)
    env.reset(seed=0)
    start = env.unwrapped.trainer.evaluate("validation")
    rewards, _, inner = episode(env)
    assert sum(rewards) == pytest.approx(float(start[0] - inner.trainer.evaluate("validation")[0]))


def test_a_rewards_own_objective_is_the_runs(options):
    reward = {"terms": {"final": 1.0}, "objective": {"verbs": 1.0}}
    env = gym.make(ID, **options, reward=reward).unwrapped
    assert env.trainer.info.targets == ("verbs",)
    with pytest.raises(ConfigError, match="must be left out beside targets"):
        gym.make(ID, **options, reward=reward, targets="letters")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "verbz"}, "did you mean 'verbs'?"),
        ({"domains": "verbs"}, "must be two or more"),
        ({"objective": "ppl"}, "objective='ppl': must be one of loss, perplexity"),
        ({"cut": {"verbs": 0}}, "cut=verbs=0: must be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(options, settings, message):
    with pytest.raises(ConfigError, match=message):
        gym.make(ID, **options, **settings)
