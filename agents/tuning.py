"""What `acodm tune` tries: ranges of hyper-parameters, and the objective that a learned policy reaches.

The ranges are ours, around the shipped settings and the paper's. Only settings that an algorithm's file has are tried,
so each algorithm is searched in what it knows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from acodm_env.env import MixtureEnv

from .hyperparameters import Settings
from .learning import EVALUATION_SEED
from .sb3 import build_agent, normalised


class Trial(Protocol):
    """What an Optuna trial can do."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number between `low` and `high`."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        """One of `choices`."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, evenly in their logarithm."""

    low: float
    high: float

    def suggest(self, trial: Trial, name: str) -> float:
        """The trial's value, to three digits."""
        return float(f"{trial.suggest_float(name, self.low, self.high, log=True):.3g}")

    def holds(self, value: Any) -> bool:
        """Whether `value` lies within."""
        return isinstance(value, int | float) and self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        """The trial's value."""
        return trial.suggest_categorical(name, list(self.values))

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of them."""
        return value in self.values


SPACE: dict[str, Range | Choice] = {
    "learning_rate": Range(low=1e-4, high=1e-2),
    "gamma": Choice(values=(0.9, 0.95, 0.98, 0.99, 1.0)),
    "batch_size": Choice(values=(64, 128, 256, 512)),
    "tau": Range(low=1e-3, high=5e-2),
    "gradient_steps": Choice(values=(1, 2, 4)),
    "noise_std": Range(low=0.03, high=0.5),
    "n_epochs": Choice(values=(5, 10, 20)),
    "gae_lambda": Choice(values=(0.8, 0.9, 0.95, 0.98, 1.0)),
    "ent_coef": Range(low=1e-6, high=1e-2),
    "n_delta": Choice(values=(4, 8, 16, 32)),
    "delta_std": Range(low=0.01, high=0.3),
    "policy_kwargs.net_arch": Choice(values=("64x64", "128x128", "256x256")),
    "policy_kwargs.logit_penalty": Range(low=1e-4, high=0.3),
    "policy_kwargs.optimizer_kwargs.weight_decay": Range(low=1e-6, high=0.1),
}
"""Range per setting of RL-Zoo's format; a dot leads into a nested one. Layer sizes are written 64x64."""


def present(settings: Settings) -> dict[str, Any]:
    """The values of `SPACE`'s settings, as trials write them, that the settings have; others are not searched."""
    found = {name: _get(settings, name.split(".")) for name in SPACE}
    return {name: _shape(value) for name, value in found.items() if value is not None}


def suggested(settings: Settings, trial: Trial) -> Settings:
    """The settings with the trial's values in the place of their own."""
    for name in present(settings):
        value = SPACE[name].suggest(trial, name)
        layers = [int(units) for units in value.split("x")] if isinstance(value, str) else value
        settings = _set(settings, name.split("."), layers)
    return settings


def _get(settings: Any, path: list[str]) -> Any:
    for name in path:
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings


def _set(settings: Mapping[str, Any], path: list[str], value: Any) -> Settings:
    name, *rest = path
    return {**settings, name: _set(settings[name], rest, value) if rest else value}


def _shape(value: Any) -> Any:
    plain = isinstance(value, list) and all(isinstance(units, int) for units in value)
    return "x".join(map(str, value)) if plain else value


def learned_objective(
    algo: str,
    settings: Settings,
    make_env: Callable[[], gym.Env[Any, Any]],
    make_many: Callable[[], VecEnv] | None,
    *,
    seed: int,
) -> float:
    """Held-out objective in nats at the end of a deterministic episode, after learning for `n_timesteps` decisions."""
    many = make_env() if make_many is None else make_many()
    venv = normalised(many, settings)
    agent = build_agent(algo, venv, settings, seed=seed)
    venv.seed(seed)
    agent.learn(int(settings["n_timesteps"]))
    env = make_env().unwrapped
    assert isinstance(env, MixtureEnv)
    return final_objective(agent, venv, env)


def final_objective(agent: BaseAlgorithm, venv: VecNormalize, env: MixtureEnv) -> float:
    """Objective in nats at the end of one deterministic episode, always the same one; NaN if the run diverged."""
    observation, info = env.reset(seed=EVALUATION_SEED)
    state: tuple[NDArray[Any], ...] | None = None
    start, done = np.ones(1, dtype=bool), False
    while not done:
        normalised = venv.normalize_obs(observation[None])
        action, state = agent.predict(normalised, state, start, deterministic=True)
        observation, _, terminated, truncated, info = env.step(action[0])
        start, done = np.zeros(1, dtype=bool), terminated or truncated
    return float("nan") if info["diverged"] else float(info["objective"])
