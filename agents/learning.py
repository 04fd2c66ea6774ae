"""Learning a policy on an environment: episodes, log, best-policy keeping, checkpoints, exact resume."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, make_output_format
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from acodm_env.env import MixtureEnv
from acodm_env.errors import ConfigError
from acodm_env.files import recover_folder
from acodm_env.policy.dense import Policy
from acodm_env.policy.equivariant import split_mask
from acodm_env.policy.load import open_policy

from .algorithms import require_fit
from .baselines import make_mixer
from .checkpoint import load_checkpoint, load_networks, save_checkpoint
from .export import to_policy
from .hyperparameters import SURROGATE, AgentRecipe, settings_for
from .initial import begin_with, require_equivariant, settings_to_begin, warm_up_critic
from .sb3 import build_agent, decisions_per_episode, env_id_of, normalised, section_of
from .teacher import warm_up

SATURATED = 0.95
"""An action entry beyond ± this counts as saturated."""
EVALUATION_SEED = 1_000_003

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How long to learn, and how often to look."""

    algo: str = "td3"
    episodes: int = 10
    """Episodes of experience."""
    evaluate_every: int = 5
    """Episodes between evaluations of the deterministic policy; 0 evaluates at the end only."""
    evaluation_episodes: int = 1
    """Episodes of an evaluation: several, where they differ in more than their noise."""
    checkpoint_every: int = 1
    """Episodes between checkpoints: where an episode takes milliseconds, writing would take most of the time."""
    teacher: str | None = None
    """Mixer that fills the replay buffer and pre-trains the agent before its first episode."""
    teacher_decisions: int = 200
    """Decisions of the teacher."""
    init: str | None = None
    """Policy to begin with: a shipped one's name, or a folder; see `initial`."""
    warm_up: int = 200
    """Decisions under it from which the critic alone learns."""
    seed: int = 0


class Learner:
    """An agent, its environment, and a folder in which both can be resumed."""

    def __init__(
        self,
        make_env: Callable[[], gym.Env[Any, Any]],
        learning: Learning,
        recipe: AgentRecipe,
        folder: Path,
        *,
        conf_file: str | Path | None = None,
        make_many: Callable[[], VecEnv] | None = None,
    ):
        """Make environment and agent.

        Args:
            make_env: makes one environment: what is evaluated on, exported for and, without `make_many`, learned on.
            learning: how long and how often.
            recipe: changes of the hyper-parameters.
            folder: of the run.
            conf_file: hyper-parameters in RL-Zoo's format, instead of the shipped ones.
            make_many: makes the same environment N times, as arrays; its episodes must end together.
        """
        require_fit(learning.algo)
        self.learning = learning
        self.folder = folder
        self._initial = None if learning.init is None else open_policy(learning.init)
        if self._initial is not None:
            require_equivariant(self._initial)
            make_env = _probing(make_env, self._initial)
        self.env = _unwrapped(make_env())
        settings = settings_for(learning.algo, section_of(self.env), recipe, conf_file)
        self.venv: VecNormalize = normalised(make_many() if make_many else self.env, settings)
        if self._initial is not None:
            settings = settings_to_begin(settings, self._initial)
        self.agent: BaseAlgorithm = build_agent(learning.algo, self.venv, settings, seed=learning.seed)
        if self._initial is not None:
            begin_with(self.agent, self._initial)
        self.venv.seed(learning.seed)
        if learning.teacher is not None:
            _check_teacher(self.agent, learning.teacher)
        self._make_env = make_env
        self._evaluation_env: MixtureEnv | None = None
        self.decisions = decisions_per_episode(self.venv)
        self.rows: list[Row] = []
        self.seconds = 0.0
        self.best_objective: float | None = None
        self.warm_up: Row | None = None

    def checkpoint(self, name: str) -> Path:
        """Folder of the checkpoint "initial", "last" or "best"."""
        return recover_folder(self.folder / "checkpoints" / name)

    def save(self, name: str) -> None:
        """Save agent, log and clock as checkpoint `name`."""
        extra = {
            "rows": self.rows,
            "seconds": self.seconds,
            "best_objective": self.best_objective,
            "warm_up": self.warm_up,
        }
        save_checkpoint(self.checkpoint(name), self.agent, self.venv, extra)

    def load(self, name: str, *, resume: bool = True) -> None:
        """Go on from checkpoint `name`."""
        extra = load_checkpoint(self.checkpoint(name), self.agent, self.venv, resume=resume)
        self.rows, self.seconds = extra["rows"], float(extra["seconds"])
        self.best_objective, self.warm_up = extra["best_objective"], extra.get("warm_up")

    def load_networks(self, name: str) -> None:
        """Take the networks of checkpoint `name` and nothing else of it."""
        load_networks(self.checkpoint(name), self.agent)

    def learn(self, on_decision: Callable[[Row], None] = lambda row: None) -> None:
        """Learn until the budget of episodes is spent, resuming from the last checkpoint if there is one."""
        if (self.checkpoint("last") / "manifest.json").exists():
            self.load("last")
        if len(self.rows) >= self.learning.episodes:
            return
        self.agent.set_logger(_logger(self.folder / "logs", self.agent.num_timesteps))
        fresh = self.agent.num_timesteps == 0
        if fresh and self.learning.teacher is not None:
            self._follow(self.learning.teacher)
        if fresh and self._initial is not None:
            self._warm_up()
        waves = -(-self.learning.episodes // self.venv.num_envs)
        budget = waves * self.venv.num_envs * self.decisions - self.agent.num_timesteps  # fewer, if one diverges
        callback = _Episodes(self, on_decision)
        try:
            self.agent.learn(budget, callback=callback, reset_num_timesteps=fresh, log_interval=None)  # type: ignore[arg-type]
        finally:
            self.agent.logger.close()
        self.load("last", resume=False)  # what was done beyond the last whole episode does not count

    def _follow(self, teacher: str) -> None:
        """Fill the replay buffer with the teacher's decisions and pre-train on them; their time counts as learning."""
        started = time.perf_counter()
        if not self.checkpoint("initial").exists():
            self.venv.reset()
            self.save("initial")  # of an agent that was taught nothing
        report = warm_up(self.agent, teacher, decisions=self.learning.teacher_decisions, seed=self.learning.seed)
        self.warm_up = asdict(report)
        self.seconds += time.perf_counter() - started

    def _warm_up(self) -> None:
        """Evaluate the initial policy, which is the best until another is, and let the critic learn under it."""
        started = time.perf_counter()
        self.venv.reset()
        if not self.checkpoint("initial").exists():
            self.save("initial")
        begun = self.evaluate()
        self.best_objective = begun["eval_objective"]
        self.save("best")
        warm_up_critic(self.agent, self.learning.warm_up)
        self.warm_up = {"init": self.learning.init, "decisions": self.agent.num_timesteps, **begun}
        self.agent.num_timesteps = 0  # the budget of episodes is that of learning
        self.seconds += time.perf_counter() - started

    @property
    def steps(self) -> int:
        """Optimiser steps of the proxy so far, those of evaluations and of the teacher included; 0 on a surrogate."""
        if env_id_of(self.env) == SURROGATE:
            return 0
        beforehand = self.warm_up or {"decisions": 0}
        taught = beforehand["decisions"] * self.env.trainer.info.decision_every + beforehand.get("eval_steps", 0)
        return int(sum(row["steps"] + row.get("eval_steps", 0) for row in self.rows) + taught)

    def policy(self, provenance: Mapping[str, Any]) -> Policy:
        """The agent as it is now, in exported form."""
        return to_policy(self.agent, self.venv, self.env, provenance)

    def evaluate(self) -> Row:
        """Deterministic episodes on an environment of its own, always the same ones; means over them."""
        if self._evaluation_env is None:
            self._evaluation_env = _unwrapped(self._make_env())
        policy = self.policy({})
        played = [
            _play(policy, self._evaluation_env, EVALUATION_SEED + index)
            for index in range(self.learning.evaluation_episodes)
        ]
        objectives = [row["objective"] for row in played]
        return {
            "eval_return": float(np.mean([row["return"] for row in played])),
            "eval_objective": None if None in objectives else float(np.mean(objectives)),
            "eval_steps": sum(row["steps"] for row in played),
        }


def _play(policy: Policy, env: MixtureEnv, seed: int) -> Row:
    """One episode under a policy."""
    layout = () if policy.domains else env.observer.layout  # a policy for any domains is told of padding apart
    observation, info = env.reset(seed=seed)
    total, done = 0.0, False
    while not done:
        observation, reward, terminated, truncated, info = env.step(policy.act(*split_mask(observation, layout)))
        total, done = total + reward, terminated or truncated
    objective = None if info["diverged"] else info["objective"]
    return {"return": total, "objective": objective, "steps": int(info["step"])}


class _Episodes(BaseCallback):
    """Watches decisions; between episodes logs, evaluates, keeps the best and saves."""

    def __init__(self, learner: Learner, on_decision: Callable[[Row], None]):
        super().__init__()
        self.learner = learner
        self.on_decision = on_decision
        self._seen: list[Row] = []  # of each decision, arrays (N,) over the environments
        self._ended: list[Row] = []  # episodes that ended since the last checkpoint
        self._between_episodes = False
        self._started = time.perf_counter()

    def _on_training_start(self) -> None:
        if not self.learner.rows and not self.learner.checkpoint("initial").exists():
            self.learner.save("initial")

    def _on_step(self) -> bool:
        if len(self.learner.rows) >= self.learner.learning.episodes:
            return False  # episodes that diverged were short: their decisions are left over
        infos, dones = self.locals["infos"], self.locals["dones"]
        seen = {
            "reward": self.learner.venv.get_original_reward(),
            "saturation": np.mean(np.abs(np.asarray(self.locals["actions"])) > SATURATED, axis=1),
            "clipped": np.array([info.get("clipped_frac", np.nan) for info in infos]),
        }
        self._seen.append(seen)
        self._between_episodes = bool(dones[0])
        assert all(dones) == any(dones)  # see `make_many`
        if self._between_episodes:
            self._ended += [self._summary(index, info) for index, info in enumerate(infos)]
            self._seen = []
        self.on_decision({name: float(np.mean(values)) for name, values in seen.items()})
        return True

    def _summary(self, index: int, info: Row) -> Row:
        diverged = info.get("diverged", 0.0)
        return {
            "episode": len(self.learner.rows) + len(self._ended) + index + 1,
            "decisions": self.learner.agent.num_timesteps,
            "return": float(sum(seen["reward"][index] for seen in self._seen)),
            "objective": None if diverged else float(info["objective"]),
            "saturation": float(np.mean([seen["saturation"][index] for seen in self._seen])),
            "clipped": _number(np.mean([seen["clipped"][index] for seen in self._seen])),
            "diverged": diverged,
            "steps": int(info.get("step", self.learner.env.trainer.info.horizon)),
        }

    def _on_rollout_start(self) -> None:
        if self._checkpoint_due():
            if not self._between_episodes:
                self._start_episode()
            self._end_episodes()

    def _on_training_end(self) -> None:
        if self._ended:
            self._end_episodes()

    def _checkpoint_due(self) -> bool:
        learning, number = self.learner.learning, len(self._ended)
        last = len(self.learner.rows) + number >= learning.episodes
        return number > 0 and (number >= learning.checkpoint_every or last)

    def _start_episode(self) -> None:
        """A rollout (PPO, A2C) ended inside an episode, after a divergence: only a whole episode can be saved."""
        agent = self.learner.agent
        agent._last_obs = self.learner.venv.reset()
        agent._last_episode_starts = np.ones(self.learner.venv.num_envs, dtype=bool)
        self._seen = []

    def _end_episodes(self) -> None:
        learner, rows = self.learner, self._ended
        better = False
        if any(self._evaluation_due(row["episode"]) for row in rows):
            rows[-1] |= learner.evaluate()
            better = _better(rows[-1]["eval_objective"], learner.best_objective)
            learner.best_objective = rows[-1]["eval_objective"] if better else learner.best_objective
        learner.rows += rows
        learner.seconds += time.perf_counter() - self._started
        self._started, self._ended = time.perf_counter(), []
        for row in rows:
            self._log(row)
        if better or not learner.checkpoint("best").exists():
            learner.save("best")
        learner.save("last")  # after "best": an interruption between the two repeats both

    def _evaluation_due(self, episode: int) -> bool:
        every = self.learner.learning.evaluate_every
        return episode >= self.learner.learning.episodes or (every > 0 and episode % every == 0)

    def _log(self, row: Row) -> None:
        names = {
            "return": "env/return",
            "objective": "proxy/objective_nats",
            "saturation": "agent/saturation",
            "clipped": "env/clipped_frac",
            "eval_return": "env/eval_return",
            "eval_objective": "proxy/eval_objective_nats",
        }
        for key, name in names.items():
            if row.get(key) is not None:
                self.logger.record(name, row[key])
        self.model.dump_logs()


def _number(value: float) -> float | None:
    """None for what the environments do not tell."""
    return float(value) if np.isfinite(value) else None


def _better(objective: float | None, best: float | None) -> bool:
    return objective is not None and (best is None or objective < best)


def _logger(folder: Path, num_timesteps: int) -> Logger:
    """CSV always, TensorBoard where it is installed; a resumed run goes on in files of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ["csv", *(["tensorboard"] if find_spec("tensorboard") else [])]
    return Logger(str(folder), [make_output_format(kind, str(folder), f"_from_{num_timesteps}") for kind in kinds])


def _probing(make_env: Callable[[], gym.Env[Any, Any]], policy: Policy) -> Callable[[], gym.Env[Any, Any]]:
    """The factory of proxies that show what the policy to begin with measures; surrogates have a way of their own."""

    def make() -> gym.Env[Any, Any]:
        env = make_env()
        if env_id_of(_unwrapped(env)) != SURROGATE:
            _unwrapped(env).probe_sequences = policy.probe_sequences
        return env

    return make


def _unwrapped(env: gym.Env[Any, Any]) -> MixtureEnv:
    assert isinstance(env.unwrapped, MixtureEnv)
    return env.unwrapped


def _check_teacher(agent: BaseAlgorithm, teacher: str) -> None:
    """Refuse a teacher before anything is written."""
    make_mixer(teacher)
    if not isinstance(agent, OffPolicyAlgorithm):
        raise ConfigError(
            f"teacher={teacher}: must be left out for {type(agent).__name__}; its decisions fill a replay buffer, "
            f"which an on-policy algorithm has not; use td3, ddpg, sac or another off-policy algorithm"
        )
