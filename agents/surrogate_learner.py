"""A learner that enters the comparison on surrogates: algorithm, environment, changes, teacher, in one value."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from acodm_env.config import from_dict
from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.policy.dense import Policy
from acodm_env.surrogate.env import SurrogateEnv
from acodm_env.surrogate.vector import SurrogateVectorEnv

from .export import to_policy
from .hyperparameters import PROBLEMS, SURROGATE, AgentRecipe, settings_for
from .initial import begin_with, frozen_actor, require_equivariant, settings_to_begin, warm_up_critic
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


class _Clock(BaseCallback):
    """Ends learning after so many seconds of this process's CPU time; learning rates fall by that clock."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds, self.started = seconds, time.process_time()

    def _on_training_start(self) -> None:
        self._base = base = self.model.lr_schedule
        self.model.lr_schedule = lambda _: base(self.left)

    def _on_training_end(self) -> None:
        self.model.lr_schedule = self._base

    @property
    def left(self) -> float:
        """Share of the time that is left."""
        return max(0.0, 1 - (time.process_time() - self.started) / self.seconds)

    def _on_step(self) -> bool:
        return self.left > 0


def learn(
    contender: Contender,
    env: Mapping[str, Any],
    seed: int,
    *,
    seconds: float | None = None,
    init: Policy | None = None,
) -> Learned:
    """Learn on arrays of surrogate episodes until the budget of timesteps, or of time, is spent.

    Args:
        contender: who.
        env: settings of `SurrogateConfig`, under those of the contender.
        seed: of everything; seeds the global generators of python, numpy and torch, from which SB3 draws.
        seconds: CPU time of this process to learn for, instead of timesteps; learning rates given as lin_… fall by it.
        init: policy to begin with (see `initial`); for `WARM_UP` of the budget the critic alone learns.

    Raises:
        ConfigError: an unknown algorithm or setting.
    """
    started = time.perf_counter()
    settings = {**env, **contender.env}
    recipe = from_dict(AgentRecipe, contender.agent, "agent")
    section = SURROGATE if settings.get("problems") is None else PROBLEMS
    hyper = settings_for(contender.algo, section, recipe)
    if section == PROBLEMS:
        settings = {**hyper.get("env_kwargs", {}), **settings}
    if init is not None:
        require_equivariant(init)
        if section == PROBLEMS:
            settings["steps_per_action"] = init.decision_every  # as often as it was learned to
        hyper = settings_to_begin(hyper, init)
    core = SurrogateVectorEnv(int(hyper.get("n_envs", 1)), **settings)
    venv = normalised(ArrayVecEnv(core), hyper)
    agent = build_agent(contender.algo, venv, hyper, seed=seed)
    if init is not None:
        begin_with(agent, init)
    venv.seed(seed)
    shape: MixtureEnv = SurrogateEnv(**(settings | {"reward": "progress"}))  # its spaces; it is never stepped
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    if contender.teacher is not None:
        from .teacher import warm_up

        warm_up(agent, contender.teacher, decisions=contender.teacher_decisions, options=contender.teacher_options)
    warm = 0.0 if init is None else WARM_UP
    _spend(agent, int(contender.timesteps * int(hyper["n_timesteps"])), seconds, warm)
    spent = time.perf_counter() - started
    provenance = {"algo": contender.algo, "seed": seed, "timesteps": agent.num_timesteps, "env": dict(settings)}
    policy = to_policy(agent, venv, shape, provenance)
    with torch.no_grad():
        agent.policy.load_state_dict(before)
    untrained = to_policy(agent, venv, shape, provenance | {"checkpoint": "untrained" if init is None else "initial"})
    return Learned(policy, untrained, agent.num_timesteps, spent)


def _spend(agent: BaseAlgorithm, timesteps: int, seconds: float | None, warm: float) -> None:
    """Learn for the budget; for a share `warm` of it with the critic alone."""
    if seconds is None:
        warm_up_critic(agent, int(warm * timesteps))
        agent.learn(timesteps - int(warm * timesteps), reset_num_timesteps=warm == 0)
        return
    if warm > 0:
        with frozen_actor(agent):
            agent.learn(_ENDLESS, callback=_Clock(warm * seconds))
    agent.learn(_ENDLESS, callback=_Clock((1 - warm) * seconds), reset_num_timesteps=warm == 0)


WARM_UP = 0.2
"""Share of the budget in which the critic alone learns, where learning begins with a policy."""
_ENDLESS = 10**12
