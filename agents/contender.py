"""A learner that enters the comparison on surrogates: algorithm, environment, changes, teacher, in one value."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from acodm_env.config import from_dict
from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.policy import Policy
from acodm_env.surrogate.env import SurrogateEnv
from acodm_env.surrogate.vector import SurrogateVectorEnv

from .export import to_policy
from .hyperparameters import SURROGATE, AgentRecipe, settings_for
from .sb3 import build_agent, normalised
from .vector import ArrayVecEnv


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What learns, and on what."""

    algo: str
    """One of `ALGORITHMS`."""
    env: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `SurrogateConfig` that differ from the comparison's."""
    agent: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the hyper-parameters (`AgentRecipe`)."""
    teacher: str | None = None
    """Mixer that warms an off-policy agent up; on arrays one that does not adapt, such as static."""
    teacher_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of that mixer."""
    teacher_decisions: int = 2000
    """Decisions of the teacher."""
    timesteps: float = 1.0
    """Factor on the hyper-parameters' n_timesteps."""

    def __post_init__(self) -> None:
        if not self.timesteps > 0:
            raise ConfigError(f"timesteps={self.timesteps}: must be a positive factor")


@dataclass(frozen=True)
class Learned:
    """A policy and what it cost."""

    policy: Policy
    untrained: Policy
    """The same agent's policy before its first update, with the observation statistics of the learned one."""
    timesteps: int
    seconds: float


def learn(contender: Contender, env: Mapping[str, Any], seed: int) -> Learned:
    """Learn on arrays of surrogate episodes until the budget of timesteps is spent.

    Args:
        contender: who.
        env: settings of `SurrogateConfig`, under those of the contender.
        seed: of everything; seeds the global generators of python, numpy and torch, from which SB3 draws.

    Raises:
        ConfigError: an unknown algorithm or setting.
    """
    started = time.perf_counter()
    settings = {**env, **contender.env}
    recipe = from_dict(AgentRecipe, contender.agent, "agent")
    hyper = settings_for(contender.algo, SURROGATE, recipe)
    core = SurrogateVectorEnv(int(hyper.get("n_envs", 1)), **settings)
    venv = normalised(ArrayVecEnv(core), hyper)
    agent = build_agent(contender.algo, venv, hyper, seed=seed)
    venv.seed(seed)
    shape: MixtureEnv = SurrogateEnv(**(settings | {"reward": "progress"}))  # its spaces; it is never stepped
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    if contender.teacher is not None:
        from .teacher import warm_up

        warm_up(agent, contender.teacher, decisions=contender.teacher_decisions, options=contender.teacher_options)
    timesteps = int(contender.timesteps * int(hyper["n_timesteps"]))
    agent.learn(timesteps)
    seconds = time.perf_counter() - started
    provenance = {"algo": contender.algo, "seed": seed, "timesteps": agent.num_timesteps, "env": dict(settings)}
    policy = to_policy(agent, venv, shape, provenance)
    with torch.no_grad():
        agent.policy.load_state_dict(before)
    untrained = to_policy(agent, venv, shape, provenance | {"checkpoint": "untrained"})
    return Learned(policy, untrained, agent.num_timesteps, seconds)
