"""`acodm/Surrogate-v0` as one vector environment: N episodes as array operations, for millions of steps a second.

Observation, action and reward are those of `MixtureEnv`, from the same tables of fields and terms. All episodes have
the same number of steps, so they end together.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from acodm_env.config import from_dict
from acodm_env.errors import ConfigError
from acodm_env.interaction import InteractionConfig
from acodm_env.mixture import Controller
from acodm_env.objective import value
from acodm_env.observation import Observer
from acodm_env.reward import Outcome, compute_terms, objective_weights
from acodm_env.step_stats import Array, StepStats, merge
from acodm_env.surrogate.env import SurrogateConfig, fields_for
from acodm_env.surrogate.problem_trainer import ProblemTrainer
from acodm_env.surrogate.trainer import SurrogateTrainer
from acodm_env.trainer import Trainer, require
from acodm_env.wrapper import Lagged

Step = tuple[NDArray[np.float32], Array, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]


class SurrogateVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.float32], Any]):
    """N independent `acodm/Surrogate-v0` episodes in step (autoreset: the step after the last one resets)."""

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, dtype: str = "float32", **settings: Any):
        """Build the environments.

        Args:
            num_envs: N.
            dtype: "float32", or "float64" for results equal to the scalar environment's.
            **settings: of `SurrogateConfig`.

        Raises:
            ConfigError: a setting is unknown, out of range, or not available here (`bounds`).
        """
        if num_envs < 1:
            raise ConfigError(f"num_envs={num_envs}: must be at least 1")
        if dtype not in ("float32", "float64"):
            raise ConfigError(f"dtype={dtype}: must be float32 or float64")
        config = from_dict(SurrogateConfig, settings, "settings")
        if config.bounds:
            raise ConfigError(f"bounds={dict(config.bounds)}: only the scalar environment projects; leave it out")
        self.num_envs, self.dtype = num_envs, np.dtype(dtype)
        self.runs: SurrogateTrainer | ProblemTrainer = config.trainer((num_envs,), self.dtype)
        self.trainer: Trainer = Lagged(self.runs, config.lag) if config.lag else self.runs
        self.reward_config, self.action_map = config.reward_config(), config.action_map()
        self._controller = Controller(self.action_map)
        info = self.trainer.info
        fields = fields_for(config, self.runs, info)
        interaction = from_dict(InteractionConfig, config.interaction or {}, "interaction")
        self.observer = Observer(info, fields, interaction, batch=(num_envs,), dtype=self.dtype)
        objective_weights(self.reward_config.objective, info)  # refuse early
        self.needs = self.observer.needs | self.reward_config.needs
        """What fields and reward have measured (`trainer.require`)."""
        require(self.trainer, self.needs, "env: fields and reward")
        self.single_observation_space = gym.spaces.Box(self.observer.low, self.observer.high, dtype=np.float32)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (self.observer.num_rows,), dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._started = self._ended = False

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start N new episodes. With a seed they are the same, bit for bit, every time."""
        if isinstance(seed, list):
            raise ConfigError(f"seed={seed}: must be one number; all episodes are drawn from one generator")
        super().reset(seed=seed)
        self.trainer.reset(np.random.default_rng(int(self.np_random.integers(2**63))))
        self._started, self._ended = True, False
        observation = self.observer.start(self.trainer.info, self.runs.mask, self.runs.problem)
        self._choices = self._choose()
        named = self.reward_config.objective
        self._objective_weights = (
            self.runs.target_weights if named is None else objective_weights(named, self.trainer.info)
        ).astype(self.dtype)
        self._objective = np.full(self.num_envs, self.trainer.info.initial_loss_nats, dtype=self.dtype)
        if "validation" in self.reward_config.needs:
            self._objective = self._judge(self.trainer.evaluate("validation"))
        self._beside = self._uniform_run() if self.reward_config.progress_over_uniform else None
        over_uniform = self.reward_config.final_over_uniform
        self._uniform_end = self._judge(self.runs.static_losses()) if over_uniform else 0.0
        zeros = np.zeros((self.num_envs, self.observer.num_rows), dtype=self.dtype)
        self._controller.start()
        self._weights = self._controller.take(zeros, self._choices, self.trainer.info.num_domains)
        self._controller.start()
        none = dict.fromkeys(self.reward_config.terms, 0.0)
        return observation, self._info(np.zeros_like(self._weights), None, none)

    def step(self, actions: NDArray[np.float32]) -> Step:
        """One decision of each episode; after the last one, one step that resets and ignores the actions."""
        if not self._started:
            raise ConfigError("step() was called before reset(): call reset() first")
        if self._ended:
            observation, info = self.reset()
            return observation, np.zeros(self.num_envs, dtype=self.dtype), self._nobody(), self._nobody(), info
        chosen: Array = np.asarray(actions, dtype=self.dtype)
        self._weights = self._controller.take(chosen, self._choices, self.trainer.info.num_domains)
        self.observer.decided(self._weights)
        window = self._train(self.trainer, self._weights)
        self._ended = window.step >= self.trainer.info.horizon
        before = self._objective
        if self._ended or "validation" in self.needs:
            held_out = self.trainer.evaluate("validation")
            window = replace(window, eval_losses=self._measured(held_out))
            self._objective = self._judge(held_out)
        observation = self.observer.observe(window)
        outcome = Outcome(
            weights=window.requested,
            observer=self.observer,
            objective_before=before,
            objective=self._objective,
            uniform_drop=self._uniform_drop(),
            ended=self._ended,
            diverged=False,
            uniform_end=self._uniform_end,
        )
        reward, domain_rewards, parts = compute_terms(self.reward_config, outcome)
        reward = np.full(self.num_envs, reward, dtype=self.dtype)
        truncated = np.full(self.num_envs, self._ended)
        return observation, reward, self._nobody(), truncated, self._info(domain_rewards, window, parts)

    def _choose(self) -> Array | None:
        """(N, R) 1 for what actions may choose, or None for everything."""
        if self.observer.general:
            choices: Array = self.observer.view.trainable
            return choices
        return self.runs.mask if self.runs.varies else None

    def _measured(self, held_out: Array) -> Array:
        """What is shown of held-out losses (N, M): on problems a measurement's."""
        sequences = self.runs.probe_sequences
        return held_out if sequences is None else self.runs.evaluate("validation", sequences)

    def _nobody(self) -> NDArray[np.bool_]:
        return np.zeros(self.num_envs, dtype=bool)

    def _train(self, trainer: Trainer, weights: Array) -> StepStats:
        window = trainer.step(weights)
        for _ in range(1, trainer.info.decision_every):
            if window.step >= trainer.info.horizon:
                break
            window = merge(window, trainer.step(weights))
        return window

    def _judge(self, losses: Array) -> Array:
        """(N,) objectives of held-out losses (N, M), nats."""
        objectives: Array = value(losses, self._objective_weights, self.runs.perplexity)
        return objectives

    def _uniform_run(self) -> SurrogateTrainer | ProblemTrainer:
        """The same surfaces again, for a run under the uniform mixture beside every episode."""
        beside = self.runs.again()
        self._uniform_objective = self._judge(beside.evaluate("validation"))
        return beside

    def _uniform_drop(self) -> Array | float:
        if self._beside is None:
            return 0.0
        self._train(self._beside, self._beside.mask / self._beside.mask.sum(-1, keepdims=True))
        before, self._uniform_objective = self._uniform_objective, self._judge(self._beside.evaluate("validation"))
        drop: Array = before - self._uniform_objective
        return drop

    def _info(self, domain_rewards: Array, window: StepStats | None, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays with a row per episode, the same keys every step, those of `MixtureEnv`."""
        shown = {
            "step": self.observer.step,
            "tokens": window.tokens if window else 0.0,
            "clipped_frac": self.observer.clipped_frac,
            "mixture_age": window.mixture_age if window else 0.0,
            "diverged": 0.0,
            **{f"reward_{name}": value for name, value in parts.items()},
        }
        return {
            "domain_rewards": domain_rewards,
            "weights": self._weights,
            "realised": window.realised if window else np.zeros_like(self._weights),
            "losses": self.observer.losses,
            "epochs": self.observer.epochs,
            "objective": self._objective,
            **{name: np.broadcast_to(np.asarray(value, self.dtype), (self.num_envs,)) for name, value in shown.items()},
        }
