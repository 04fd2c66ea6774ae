"""Actor, critic and target learned together in one run: the paper's non-proxy mode.

One episode of `MixtureEnv` is the whole training run of the target, and the last one: what is explored is spent on the
real model, and nothing is done a second time. A teacher plays the first decisions (uniform by default, with noise) and
fills the replay buffer; actor and critic are pre-trained on them, and from then on the agent acts, and learns after
every decision. Everything is in `state_dict`, so that a run killed in the middle goes on bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from acodm_env.env import MixtureEnv, Observation
from acodm_env.errors import ConfigError
from acodm_env.policy.dense import Policy
from acodm_env.reward import RewardConfig

from .algorithms import load_class, require_fit
from .baselines import make_mixer
from .checkpoint import agent_state, load_agent_state
from .export import to_policy
from .hyperparameters import AgentRecipe, settings_for
from .learning import SATURATED
from .sb3 import build_agent, decisions_per_episode, env_id_of, normalised
from .teacher import check_teacher, imitate, invert, show_mixer, start_mixer, train_critic

IMITATION_RATE = 1e-3
"""Learning rate of the regression on the teacher's actions, as `warm_up` has it."""


@dataclass(frozen=True, kw_only=True)
class Cotraining:
    """How an agent is learned beside its target."""

    algo: str = "td3"
    """An off-policy algorithm: one run is one episode, so that only a replay buffer learns before it ends."""
    start_decisions: int = 40
    """Decisions of the teacher before the agent's first."""
    teacher: str = "uniform"
    """Mixer that plays them."""
    noise: float = 0.1
    """Standard deviation of Gaussian noise on its actions: without it the critic sees one action per state."""
    pretrain_steps: int = 200
    """Gradient steps of the regression on its actions, and then of the critic alone."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("start_decisions", "noise", "pretrain_steps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 0")


def require_cotrainable(algo: str) -> None:
    """Refuse an algorithm that cannot learn within a run.

    Raises:
        ConfigError: unknown, not installed, or unfit and why.
    """
    require_fit(algo)
    if not issubclass(load_class(algo), OffPolicyAlgorithm):
        raise ConfigError(
            f"algo={algo}: must be off-policy, such as td3, ddpg, sac, acodm-td3 or acodm-ddpg; it learns from whole "
            f"rollouts and forgets them, and a co-trained run is a single episode; learn with it on a proxy "
            f"(acodm train)"
        )


def require_online(reward: RewardConfig) -> None:
    """Refuse a reward that one run cannot pay while it is learned from.

    Raises:
        ConfigError: which term, and why.
    """
    if reward.progress_over_uniform:
        raise ConfigError(
            "progress_over_uniform=True: must be false; it takes a uniform run of the target beside the co-trained "
            "one; use interaction, alignment or progress"
        )
    if reward.terms.get("final"):
        raise ConfigError(
            "reward=final: must be interaction, alignment or progress; it is paid at the end of the run, when nothing "
            "is learned any more; learn with it on a proxy (acodm train)"
        )


class OneRun(gym.Wrapper[Observation, NDArray[np.float32], Observation, NDArray[np.float32]]):
    """A run that is started once: SB3 resets an environment after its last step, which would undo the training."""

    def __init__(self, env: MixtureEnv):
        super().__init__(env)
        self._last: Observation | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the run; after its first step, the observation where it is."""
        if self._last is not None:
            return self._last, {}
        return self.env.reset(seed=seed, options=options)

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        """One decision."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._last = observation
        return observation, reward, terminated, truncated, info


class Cotrainer:
    """An agent in the middle of the run that it drives: `start` or `load_state_dict`, then `decide` until `ended`."""

    def __init__(
        self,
        env: MixtureEnv,
        cotraining: Cotraining,
        recipe: AgentRecipe | None = None,
        *,
        conf_file: str | Path | None = None,
    ):
        """Make the agent; nothing is trained yet.

        Args:
            env: around the target.
            cotraining: how to learn.
            recipe: changes of the agent's hyper-parameters.
            conf_file: hyper-parameters in RL-Zoo's format, instead of the shipped ones.

        Raises:
            ConfigError: algorithm, reward or teacher cannot be used within a run, or a setting is wrong.
        """
        require_cotrainable(cotraining.algo)
        require_online(env.reward_config)
        self.env, self.cotraining = env, cotraining
        settings = settings_for(cotraining.algo, env_id_of(env), recipe, conf_file)
        self.venv: VecNormalize = normalised(DummyVecEnv([lambda: OneRun(env)]), settings)
        self.agent = cast(OffPolicyAlgorithm, build_agent(cotraining.algo, self.venv, settings, seed=cotraining.seed))
        self.agent.learning_starts = 0  # the teacher's decisions stand in for random ones
        self.agent.set_logger(Logger(None, []))
        self.agent._total_timesteps = decisions_per_episode(self.venv)
        self._learn_every = _frequency(self.agent)
        self._teacher = make_mixer(cotraining.teacher)
        check_teacher(self._teacher, self.venv)
        self._rng = np.random.default_rng(cotraining.seed)
        self._observations: list[NDArray[np.float32]] = []  # (S,) each, of the teacher's decisions
        self._actions: list[NDArray[np.float32]] = []  # (K,) each, without noise
        self._action: NDArray[np.float32] | None = None  # (1, K), while the target trains under it
        self.shown: dict[str, float] = {}
        """What the last decision showed: its reward, and the losses of what was learned from it."""
        self.total_reward = 0.0
        self.ended = False
        self.diverged = False

    @property
    def updates(self) -> int:
        """Gradient steps of the agent so far."""
        return int(self.agent._n_updates)

    @property
    def decisions(self) -> int:
        """Decisions taken so far."""
        return int(self.agent.num_timesteps)

    def start(self) -> None:
        """Start the run."""
        self.venv.seed(self.cotraining.seed)
        self.agent._last_obs = cast(NDArray[Any], self.venv.reset())
        self.agent._last_original_obs = self.venv.get_original_obs()
        start_mixer(self._teacher, self.venv, 0)

    def decide(self) -> dict[str, float]:
        """One decision: act, train the target, and learn from it unless it was the last; returns what it showed."""
        agent, taught = self.agent, self.decisions < self.cotraining.start_decisions
        assert agent.replay_buffer is not None
        if self._action is None:  # else the decision was interrupted
            self._action = self._teach() if taught else self._act()  # (1, K)
        action = self._action
        observation, rewards, dones, infos = self.venv.step(action)
        self._action = None
        agent.num_timesteps += 1
        agent._store_transition(agent.replay_buffer, action, cast(NDArray[Any], observation), rewards, dones, infos)
        agent._update_current_progress_remaining(agent.num_timesteps, agent._total_timesteps)
        self.ended, self.diverged = bool(dones[0]), bool(infos[0]["diverged"])
        reward = float(self.venv.get_original_reward()[0])
        self.total_reward += reward
        shown = {
            "reward": reward,
            "saturation": float(np.mean(np.abs(action) > SATURATED)),
            "clipped_frac": float(infos[0]["clipped_frac"]),
            "taught": float(taught),
        }
        if taught:
            show_mixer(self._teacher, self.venv, 0)
        self.shown = shown if self.ended else shown | self._learn()
        return self.shown

    def _teach(self) -> NDArray[np.float32]:
        """The teacher's action (1, K) with noise; the one without is kept."""
        action, _ = invert(self._teacher, self.env.action_map)
        self._observations.append(np.asarray(self.venv.get_original_obs())[0].copy())
        self._actions.append(action.astype(np.float32))
        noisy = action + self.cotraining.noise * self._rng.normal(size=action.shape)
        return np.clip(noisy, -1, 1).astype(np.float32)[None]

    def _act(self) -> NDArray[np.float32]:
        """The agent's action (1, K), explored as its algorithm does."""
        self.agent.policy.set_training_mode(False)
        if self.agent.use_sde:
            cast(Any, self.agent.actor).reset_noise(1)
        _, action = self.agent._sample_action(0, self.agent.action_noise, 1)
        return np.asarray(action, dtype=np.float32)

    def _learn(self) -> dict[str, float]:
        """Pre-train after the teacher's last decision, learn after each of the agent's; returns the losses."""
        if self.decisions == self.cotraining.start_decisions and self.cotraining.pretrain_steps:
            return self._pretrain()
        if self.decisions <= self.cotraining.start_decisions or self.decisions % self._learn_every:
            return {}
        agent = self.agent
        steps = self._learn_every if agent.gradient_steps < 0 else agent.gradient_steps
        if steps == 0:
            return {}
        agent.logger.name_to_value.clear()  # a loss is not always recorded, and an old one is none of this decision
        agent.train(gradient_steps=steps, batch_size=agent.batch_size)
        losses = {name.removeprefix("train/"): value for name, value in agent.logger.name_to_value.items()}
        return {name: float(value) for name, value in losses.items() if name.endswith("loss") and np.isfinite(value)}

    def _pretrain(self) -> dict[str, float]:
        steps = self.cotraining.pretrain_steps
        observations, actions = np.array(self._observations), np.array(self._actions)
        _, imitation = imitate(self.agent, observations, actions, steps, IMITATION_RATE, self._rng)
        train_critic(self.agent, steps)
        self._observations, self._actions = [], []
        return {"imitation_loss": imitation}

    def policy(self, provenance: Mapping[str, Any]) -> Policy:
        """The agent as it is now, in exported form."""
        return to_policy(self.agent, self.venv, self.env, provenance)

    def state_dict(self) -> dict[str, Any]:
        """Target, observer, reward, agent, replay, teacher and every generator.

        Between two decisions, or after `decide` was left by an exception of the trainer between two of its steps: the
        same decision goes on then.
        """
        return {
            "env": self.env.state_dict(),
            "agent": agent_state(self.agent, self.venv),
            "teacher": self._teacher.state_dict() if self.decisions < self.cotraining.start_decisions else {},
            "taught": {
                "observations": [*self._observations],
                "actions": [*self._actions],
            },
            "rng": self._rng.bit_generator.state,
            "action": self._action,
            "ended": self.ended,
            "shown": self.shown,
            "total_reward": self.total_reward,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly from `state_dict`'s value, instead of `start`."""
        self.env.load_state_dict(state["env"])
        start_mixer(self._teacher, self.venv, 0)
        if state["agent"]["counters"]["num_timesteps"] < self.cotraining.start_decisions:
            self._teacher.load_state_dict(state["teacher"])
        self._observations, self._actions = (list(state["taught"][name]) for name in ("observations", "actions"))
        self._rng.bit_generator.state = state["rng"]
        self._action, self.ended = state["action"], bool(state["ended"])
        self.shown, self.total_reward = dict(state["shown"]), float(state["total_reward"])
        load_agent_state(self.agent, self.venv, state["agent"])  # last: it sets the global generators


def _frequency(agent: OffPolicyAlgorithm) -> int:
    """Decisions between two rounds of learning."""
    frequency = cast(TrainFreq, agent.train_freq)  # a plain number only before the agent is set up
    if frequency.unit is not TrainFrequencyUnit.STEP:
        raise ConfigError("train_freq=episode: must be a number of decisions; a co-trained run is a single episode")
    return frequency.frequency
