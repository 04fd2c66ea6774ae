"""Agents by one word: `make_agent("td3", env)`, with the hyper-parameters of `hyperparams/td3.yml`.

The paper's agent is DDPG; TD3 is its successor with two critics, delayed actor updates and smoothed targets. A tanh
actor saturates within a few dozen updates when transitions are few, and a saturated actor has no gradient to come
back on: so observations and rewards are normalised, and the actor's loss gets a penalty on its pre-tanh logits.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.surrogate.problem_trainer import ProblemTrainer
from acodm_env.surrogate.trainer import SurrogateTrainer
from acodm_env.trainer import RunInfo
from acodm_env.wrapper import innermost

from .algorithms import ALGORITHMS, load_class
from .hyperparameters import OURS, PROBLEMS, PROXY, SURROGATE, AgentRecipe, Settings, settings_for
from .penalty import LogitPenalty
from .zoo_format import resolve

__all__ = [
    "ALGORITHMS",
    "AgentRecipe",
    "LogitPenalty",
    "build_agent",
    "decisions_per_episode",
    "env_id_of",
    "make_agent",
    "normalised",
    "section_of",
    "vectorise",
]

DEFAULT_DECISIONS = 40
"""Decisions in an episode of either environment with its default arguments: the unit of `n_steps` in the files."""


def vectorise(
    env: MixtureEnv | gym.Env[Any, Any] | VecEnv, gamma: float, *, norm_obs: bool = True, norm_reward: bool = True
) -> VecNormalize:
    """Running normalisation of observation and reward around an environment, monitored, or around a vectorised one."""
    vectorised = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: Monitor(env)])
    wrapper = VecNormalize(vectorised, gamma=gamma, norm_reward=norm_reward)
    wrapper.norm_obs = norm_obs  # only now: checkpoints hold the statistics, used or not
    return wrapper


def normalised(env: MixtureEnv | gym.Env[Any, Any] | VecEnv, settings: Settings) -> VecNormalize:
    """`vectorise` as RL-Zoo's `normalize` says: true, false, or dict(norm_obs=…, norm_reward=…).

    Raises:
        ConfigError: another value.
    """
    normalize = settings.get("normalize", False)
    chosen = dict.fromkeys(("norm_obs", "norm_reward"), normalize) if isinstance(normalize, bool) else normalize
    known = isinstance(chosen, dict) and chosen.keys() <= {"norm_obs", "norm_reward"}
    if not known or not all(isinstance(value, bool) for value in chosen.values()):
        raise ConfigError(f"normalize={normalize}: must be true, false, or dict(norm_obs=…, norm_reward=…) of those")
    return vectorise(env, settings.get("gamma", 1.0), **chosen)


def make_agent(
    name: str,
    env: VecEnv,
    recipe: AgentRecipe | None = None,
    *,
    env_id: str | None = None,
    conf_file: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> BaseAlgorithm:
    """An agent for vectorised `MixtureEnv`s, one or several.

    Args:
        name: one of `ALGORITHMS`.
        env: see `vectorise`.
        recipe: changes of the hyper-parameters.
        env_id: the environment whose hyper-parameters to take; None: its own, see `section_of`.
        conf_file: a YAML file in RL-Zoo's format instead of `hyperparams/<name>.yml`.
        seed: seeds the global generators of python, numpy and torch, from which SB3 draws.
        device: where the small networks live; the CPU is the fastest place for them.

    Raises:
        ConfigError: an unknown algorithm or setting, with a suggestion; or a package is missing.
    """
    settings = settings_for(name, env_id or section_of(env), recipe, conf_file)
    return build_agent(name, env, settings, seed=seed, device=device)


def build_agent(name: str, env: VecEnv, settings: Settings, *, seed: int = 0, device: str = "cpu") -> BaseAlgorithm:
    """The agent of `settings_for`'s settings."""
    assert isinstance(env.action_space, gym.spaces.Box)
    kind = load_class(name)
    arguments = {key: resolve(value) for key, value in settings.items() if key not in OURS}
    policy = _policy(arguments.pop("policy", "MlpPolicy"))
    if settings.get("noise_type"):
        arguments["action_noise"] = _noise(settings, env.action_space.shape[0])
    if "learning_rate" in arguments:
        arguments["learning_rate"] = _schedule(arguments["learning_rate"])
    if issubclass(kind, OnPolicyAlgorithm):
        arguments |= _rollout(settings, decisions_per_episode(env), env.num_envs)
    elif arguments.get("train_freq") == [1, "episode"] and env.num_envs > 1:
        arguments["train_freq"] = decisions_per_episode(env)  # SB3 refuses; here all episodes end together
    agent: BaseAlgorithm = kind(policy, env, seed=seed, device=device, **arguments)
    return agent


def _policy(name: str) -> Any:
    """A policy's class from "package.module.Class"; a bare name is one of the algorithm's own policies."""
    module, _, attribute = name.rpartition(".")
    if not module:
        return name
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"policy={name}: must be a policy's name or package.module.Class; {error}") from error


def _noise(settings: Settings, num_domains: int) -> NormalActionNoise:
    if settings["noise_type"] != "normal":
        raise ConfigError(f"noise_type={settings['noise_type']}: must be normal")
    return NormalActionNoise(np.zeros(num_domains), np.full(num_domains, float(settings["noise_std"])))


def _schedule(rate: float | str) -> Any:
    """A constant, or RL-Zoo's "lin_0.001": from 0.001 to 0 over the budget."""
    if not isinstance(rate, str):
        return rate
    kind, _, start = rate.partition("_")
    try:
        initial = float(start)
    except ValueError:
        initial = 0.0
    if kind != "lin" or initial <= 0:
        raise ConfigError(f"learning_rate={rate}: must be a positive number, or lin_<number> for one that falls to 0")
    return lambda remaining: remaining * initial


def _rollout(settings: Settings, decisions: int, num_envs: int) -> Settings:
    """Whole episodes per update: `n_steps` counts them at `DEFAULT_DECISIONS` each; minibatches divide them evenly.

    On-policy algorithms bootstrap beyond the horizon, which SB3 does not let one switch off.
    """
    episodes = max(1, round(settings.get("n_steps", DEFAULT_DECISIONS) / DEFAULT_DECISIONS))
    rollout: Settings = {"n_steps": episodes * decisions}
    if "batch_size" in settings:
        rollout["batch_size"] = _minibatch(episodes * decisions * num_envs, settings["batch_size"])
    return rollout


def _minibatch(number: int, at_most: int) -> int:
    """The largest divisor of a rollout's length up to `at_most`, or all of it: PPO needs two transitions or more."""
    return max((size for size in range(2, min(number, at_most) + 1) if number % size == 0), default=number)


def env_id_of(env: VecEnv | gym.Env[Any, Any]) -> str:
    """The id of a registered environment; without one, Surrogate's on a surrogate, else ProxyPretrain's."""
    spec, trainer = (
        env.get_attr(name)[0] if isinstance(env, VecEnv) else getattr(env.unwrapped, name, None)
        for name in ("spec", "trainer")
    )
    if spec is not None:
        return str(spec.id)
    return SURROGATE if isinstance(innermost(trainer), SurrogateTrainer | ProblemTrainer) else PROXY


def section_of(env: VecEnv | gym.Env[Any, Any]) -> str:
    """The section of hyper-parameters for an environment: its id, but for random problems."""
    trainer = env.get_attr("trainer")[0] if isinstance(env, VecEnv) else getattr(env.unwrapped, "trainer", None)
    return PROBLEMS if isinstance(innermost(trainer), ProblemTrainer) else env_id_of(env)


def decisions_per_episode(env: VecEnv) -> int:
    """Decisions in a whole episode of the first environment."""
    info: RunInfo = env.get_attr("trainer")[0].info
    return -(-info.horizon // info.decision_every)
