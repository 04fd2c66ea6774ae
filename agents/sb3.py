"""Stable-Baselines3 agents by one word: `make_agent("td3" | "ddpg" | "sac" | "ppo" | "a2c", env, recipe)`.

The paper's agent is DDPG; TD3 is its successor with two critics, delayed actor updates and smoothed targets. A tanh
actor saturates within a few dozen updates when transitions are few, and a saturated actor has no gradient to come
back on: so observations and rewards are normalised, and the actor's loss gets a penalty on its pre-tanh logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import A2C, DDPG, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError, unknown
from acodm_env.trainer import RunInfo


@dataclass(frozen=True, kw_only=True)
class AgentRecipe:
    """Hyper-parameters shared by all algorithms; each takes the ones that it has."""

    gamma: float = 0.95
    """Discount per decision (paper: 0.95)."""
    learning_rate: float = 1e-3
    """Of actor and critic."""
    hidden: tuple[int, ...] = (64, 64)
    """Units of the hidden layers of actor and critic (paper: 5 × 1024)."""
    batch_size: int = 64
    """Transitions per gradient step (off-policy) or minibatch (PPO)."""
    weight_decay: float = 1e-2
    """Decoupled (AdamW) weight decay of actor and critic (paper: 0.1)."""
    logit_penalty: float = 0.1
    """λ of λ/2·mean‖z‖² on the pre-tanh logits z, added to the actor's loss (TD3, DDPG). Not in the paper."""
    buffer_size: int = 10_000
    """Replay buffer in transitions (paper: 10,000)."""
    learning_starts: int = 40
    """Random decisions before learning begins (off-policy)."""
    gradient_steps: int = 2
    """Gradient steps per decision (off-policy)."""
    tau: float = 0.005
    """Rate of the target networks (paper: 0.001)."""
    action_noise: float = 0.2
    """Standard deviation of the exploration noise (TD3, DDPG)."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"gamma={self.gamma}: must be in [0, 1]")
        if not isinstance(self.hidden, tuple) or not all(isinstance(units, int) for units in self.hidden):
            raise ConfigError(f"hidden={self.hidden}: must be a list of layer sizes, e.g. [64, 64]")
        for name in ("learning_rate", "batch_size", "buffer_size", "tau"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive")


class _Pull(torch.autograd.Function):
    """The identity, whose backward pass adds the gradient of λ/2·mean_batch‖z‖²."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.strength = strength
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logits,) = ctx.saved_tensors
        return gradient + ctx.strength * logits / len(logits), None


class LogitPenalty(torch.nn.Module):
    """Penalises the logits that pass through it, wherever a loss is back-propagated through them."""

    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits themselves (B, K)."""
        penalised: torch.Tensor = _Pull.apply(logits, self.strength)  # type: ignore[no-untyped-call]
        return penalised


def _penalise(agent: TD3, strength: float) -> None:
    """Put the penalty in front of the tanh of actor and target actor."""
    for actor in (agent.actor, agent.actor_target):
        *dense, squash = actor.mu
        actor.mu = torch.nn.Sequential(*dense, LogitPenalty(strength), squash)


def _policy_kwargs(recipe: AgentRecipe) -> dict[str, Any]:
    return {
        "net_arch": list(recipe.hidden),
        "activation_fn": torch.nn.ReLU,
        "optimizer_class": torch.optim.AdamW,
        "optimizer_kwargs": {"weight_decay": recipe.weight_decay},
    }


def _off_policy(recipe: AgentRecipe) -> dict[str, Any]:
    return {
        "buffer_size": recipe.buffer_size,
        "learning_starts": recipe.learning_starts,
        "batch_size": recipe.batch_size,
        "tau": recipe.tau,
        "train_freq": 1,
        # The horizon is the end of the run, and `progress` is in the state: nothing follows it to bootstrap from.
        "replay_buffer_kwargs": {"handle_timeout_termination": False},
        "gradient_steps": recipe.gradient_steps,
    }


def _deterministic(recipe: AgentRecipe, num_domains: int) -> dict[str, Any]:
    noise = NormalActionNoise(np.zeros(num_domains), np.full(num_domains, recipe.action_noise))
    return _off_policy(recipe) | {"action_noise": noise}


def _minibatch(number: int, at_most: int) -> int:
    """The largest divisor of a rollout's length up to `at_most`, or all of it: PPO needs two transitions or more."""
    return max((size for size in range(2, min(number, at_most) + 1) if number % size == 0), default=number)


ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], Callable[[AgentRecipe, int, int], dict[str, Any]]]] = {
    "td3": (TD3, lambda recipe, num_domains, decisions: _deterministic(recipe, num_domains)),
    "ddpg": (DDPG, lambda recipe, num_domains, decisions: _deterministic(recipe, num_domains)),
    "sac": (SAC, lambda recipe, num_domains, decisions: _off_policy(recipe)),
    "ppo": (
        PPO,
        lambda recipe, num_domains, decisions: {
            "n_steps": decisions,
            "batch_size": _minibatch(decisions, recipe.batch_size),
        },
    ),
    "a2c": (
        A2C,
        lambda recipe, num_domains, decisions: {"n_steps": decisions, "use_rms_prop": False},
    ),
}
"""Algorithm by name, and its keyword arguments from (recipe, K, decisions per episode); PPO and A2C update once an
episode, and bootstrap beyond the horizon, which SB3 does not let one switch off."""


def vectorise(env: MixtureEnv | gym.Env[Any, Any], gamma: float) -> VecNormalize:
    """Wrap one environment as SB3 wants it: monitored, with running normalisation of observation and reward."""
    return VecNormalize(DummyVecEnv([lambda: Monitor(env)]), gamma=gamma)


def make_agent(
    name: str, env: VecEnv, recipe: AgentRecipe | None = None, *, seed: int = 0, device: str = "cpu"
) -> BaseAlgorithm:
    """A Stable-Baselines3 agent for a vectorised `MixtureEnv`.

    Args:
        name: one of `ALGORITHMS`.
        env: see `vectorise`.
        recipe: hyper-parameters.
        seed: seeds the global generators of python, numpy and torch, from which SB3 draws.
        device: where the small networks live; the CPU is the fastest place for them.

    Raises:
        ConfigError: an unknown algorithm, with a suggestion.
    """
    if name not in ALGORITHMS:
        unknown("algo", name, ALGORITHMS)
    recipe = recipe or AgentRecipe()
    kind, specific = ALGORITHMS[name]
    make: Callable[..., BaseAlgorithm] = kind
    assert isinstance(env.action_space, gym.spaces.Box)
    agent = make(
        "MlpPolicy",
        env,
        gamma=recipe.gamma,
        learning_rate=recipe.learning_rate,
        policy_kwargs=_policy_kwargs(recipe),
        seed=seed,
        device=device,
        **specific(recipe, env.action_space.shape[0], decisions_per_episode(env)),
    )
    if isinstance(agent, TD3) and recipe.logit_penalty > 0:  # DDPG is a TD3
        _penalise(agent, recipe.logit_penalty)
    return agent


def decisions_per_episode(env: VecEnv) -> int:
    """Decisions in a whole episode of the first environment."""
    info: RunInfo = env.get_attr("trainer")[0].info
    return -(-info.horizon // info.decision_every)
