"""Learning a policy on an environment: episodes, log, best-policy keeping, checkpoints, exact resume."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, make_output_format
from stable_baselines3.common.vec_env import VecNormalize

from acodm_env.env import MixtureEnv
from acodm_env.files import recover_folder
from acodm_env.policy import Policy

from .checkpoint import load_checkpoint, load_networks, save_checkpoint
from .export import to_policy
from .sb3 import AgentRecipe, decisions_per_episode, make_agent, vectorise

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
    seed: int = 0


class Learner:
    """An agent, its environment, and a folder in which both can be resumed."""

    def __init__(
        self,
        make_env: Callable[[], gym.Env[Any, Any]],
        learning: Learning,
        recipe: AgentRecipe,
        folder: Path,
    ):
        self.learning = learning
        self.folder = folder
        self.env = _unwrapped(make_env())
        self.venv: VecNormalize = vectorise(self.env, recipe.gamma)
        self.agent: BaseAlgorithm = make_agent(learning.algo, self.venv, recipe, seed=learning.seed)
        self.venv.seed(learning.seed)
        self._make_env = make_env
        self._evaluation_env: MixtureEnv | None = None
        self.decisions = decisions_per_episode(self.venv)
        self.rows: list[Row] = []
        self.seconds = 0.0
        self.best_objective: float | None = None

    def checkpoint(self, name: str) -> Path:
        """Folder of the checkpoint "initial", "last" or "best"."""
        return recover_folder(self.folder / "checkpoints" / name)

    def save(self, name: str) -> None:
        """Save agent, log and clock as checkpoint `name`."""
        extra = {"rows": self.rows, "seconds": self.seconds, "best_objective": self.best_objective}
        save_checkpoint(self.checkpoint(name), self.agent, self.venv, extra)

    def load(self, name: str, *, resume: bool = True) -> None:
        """Go on from checkpoint `name`."""
        extra = load_checkpoint(self.checkpoint(name), self.agent, self.venv, resume=resume)
        self.rows, self.seconds = extra["rows"], float(extra["seconds"])
        self.best_objective = extra["best_objective"]

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
        budget = self.learning.episodes * self.decisions - self.agent.num_timesteps  # fewer, if an episode diverges
        fresh = self.agent.num_timesteps == 0
        callback = _Episodes(self, on_decision)
        try:
            self.agent.learn(budget, callback=callback, reset_num_timesteps=fresh, log_interval=None)  # type: ignore[arg-type]
        finally:
            self.agent.logger.close()
        self.load("last", resume=False)  # what was done beyond the last whole episode does not count

    @property
    def steps(self) -> int:
        """Optimiser steps of the proxy so far, evaluations included."""
        return int(sum(row["steps"] + row.get("eval_steps", 0) for row in self.rows))

    def policy(self, provenance: Mapping[str, Any]) -> Policy:
        """The agent as it is now, in exported form."""
        return to_policy(self.agent, self.venv, self.env, provenance)

    def evaluate(self) -> Row:
        """One deterministic episode on an environment of its own, always the same one."""
        if self._evaluation_env is None:
            self._evaluation_env = _unwrapped(self._make_env())
        env, policy = self._evaluation_env, self.policy({})
        observation, info = env.reset(seed=EVALUATION_SEED)
        total, done = 0.0, False
        while not done:
            observation, reward, terminated, truncated, info = env.step(policy.act(observation))
            total, done = total + reward, terminated or truncated
        objective = None if info["diverged"] else info["objective"]
        return {"eval_return": total, "eval_objective": objective, "eval_steps": int(info["step"])}


class _Episodes(BaseCallback):
    """Watches decisions; between episodes logs, evaluates, keeps the best and saves."""

    def __init__(self, learner: Learner, on_decision: Callable[[Row], None]):
        super().__init__()
        self.learner = learner
        self.on_decision = on_decision
        self._seen: list[Row] = []
        self._ended: list[Row] = []  # episodes that ended since the last checkpoint
        self._between_episodes = False
        self._started = time.perf_counter()

    def _on_training_start(self) -> None:
        if not self.learner.rows and not self.learner.checkpoint("initial").exists():
            self.learner.save("initial")

    def _on_step(self) -> bool:
        if len(self.learner.rows) >= self.learner.learning.episodes:
            return False  # episodes that diverged were short: their decisions are left over
        info, action = self.locals["infos"][0], np.asarray(self.locals["actions"])[0]
        row = {
            "reward": float(self.learner.venv.get_original_reward()[0]),
            "saturation": float(np.mean(np.abs(action) > SATURATED)),
            "clipped": info["clipped_frac"],
        }
        self._seen.append(row)
        self._between_episodes = bool(self.locals["dones"][0])
        if self._between_episodes:
            self._ended.append(self._summary(info))
            self._seen = []
        self.on_decision(row)
        return True

    def _summary(self, info: Row) -> Row:
        return {
            "episode": len(self.learner.rows) + len(self._ended) + 1,
            "decisions": self.learner.agent.num_timesteps,
            "return": sum(seen["reward"] for seen in self._seen),
            "objective": None if info["diverged"] else info["objective"],
            "saturation": float(np.mean([seen["saturation"] for seen in self._seen])),
            "clipped": float(np.mean([seen["clipped"] for seen in self._seen])),
            "diverged": info["diverged"],
            "steps": int(info["step"]),
        }

    def _on_rollout_start(self) -> None:
        if self._ended:
            if not self._between_episodes:
                self._start_episode()
            self._end_episodes()

    def _on_training_end(self) -> None:
        if self._ended:
            self._end_episodes()

    def _start_episode(self) -> None:
        """A rollout (PPO, A2C) ended inside an episode, after a divergence: only a whole episode can be saved."""
        agent = self.learner.agent
        agent._last_obs = self.learner.venv.reset()
        agent._last_episode_starts = np.ones(1, dtype=bool)
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


def _better(objective: float | None, best: float | None) -> bool:
    return objective is not None and (best is None or objective < best)


def _logger(folder: Path, num_timesteps: int) -> Logger:
    """CSV always, TensorBoard where it is installed; a resumed run goes on in files of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ["csv", *(["tensorboard"] if find_spec("tensorboard") else [])]
    return Logger(str(folder), [make_output_format(kind, str(folder), f"_from_{num_timesteps}") for kind in kinds])


def _unwrapped(env: gym.Env[Any, Any]) -> MixtureEnv:
    assert isinstance(env.unwrapped, MixtureEnv)
    return env.unwrapped
