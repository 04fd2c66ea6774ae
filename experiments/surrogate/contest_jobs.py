"""The cells of `acodm contest`: one learner with one seed, judged on problems that nobody learned on."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from acodm_env.agents import apg
from acodm_env.agents.surrogate_learner import Contender, learn
from acodm_env.config import from_dict
from acodm_env.experiments.policy.config import PROBLEMS_ENV
from acodm_env.files import read_json, write_json
from acodm_env.policy.dense import Policy
from acodm_env.policy.equivariant import split_mask
from acodm_env.policy.load import load_policy
from acodm_env.surrogate.problem_trainer import ProblemTrainer
from acodm_env.surrogate.problems import ProblemFamily
from acodm_env.surrogate.vector import SurrogateVectorEnv
from acodm_env.view import GENERAL_FIELDS

if TYPE_CHECKING:
    from acodm_env.experiments.surrogate.contest_config import ContestConfig

RULES = "fixed rules"
_UNSEEN = 1_000_003
"""Seeds of unseen problems begin here; those of learning count from 0."""
_CHOICE = 2_000_003
"""Seeds of the problems by which a learner that began with a policy is preferred to it, or not."""
_TRIAL = 40
"""Batches of apg from which its speed is told."""
SHARES = (0.3, 0.5, 0.7, 1.0)
"""Fixed rules: shares of the targets."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work."""

    name: str
    """A learner, `RULES`, or a field that apg does without."""
    seed: int
    folder: Path

    @property
    def file(self) -> Path:
        """Its result."""
        return self.folder / "cells" / f"{self.name.replace(' ', '-')}-{self.seed}.json"

    @property
    def policy(self) -> Path:
        """Where its policy lies."""
        return self.folder / "policies" / f"{self.name.replace(' ', '-')}-{self.seed}"

    @property
    def start(self) -> Path | None:
        """Where the policy lies that it begins with."""
        _, _, start = self.name.partition("@")
        return replace(self, name=start).policy if start else None

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.file.exists()


def cells_of(config: "ContestConfig", folder: Path) -> list[Cell]:
    """All cells, those first that others build on."""
    names = [RULES, *sorted(config.names, key=lambda name: "@" in name)]
    if config.ablate:
        names = ["all fields", *(f"without {name}" for name in GENERAL_FIELDS)]
    return [Cell(name=name, seed=seed, folder=folder) for seed in range(config.seeds) for name in names]


def run_cell(config: "ContestConfig", cell: Cell) -> None:
    """Do the work of a cell and write {row name: {share, median, seconds}}."""
    torch.set_num_threads(1)
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    judge = Judge(config, cell.seed)
    if cell.name == RULES:
        rows = judge.rules()
    else:
        started = time.process_time()
        policy = _learn(config, cell)
        seconds = time.process_time() - started
        rows = {cell.name: judge.policy(policy) | {"seconds": seconds}}
        if cell.start is not None:
            rows[f"{cell.name}, last"] = rows[cell.name]
            policy = _better(config, cell, policy)
            rows[cell.name] = judge.policy(policy) | {"seconds": seconds}
        policy.save(cell.policy)
    write_json(cell.file, rows)


def read_cell(cell: Cell) -> dict[str, dict[str, float]]:
    """The rows of a finished cell."""
    rows: dict[str, dict[str, float]] = read_json(cell.file)
    return rows


def _learn(config: "ContestConfig", cell: Cell) -> Policy:
    seconds = 60 * config.minutes
    if config.ablate:
        fields = [name for name in GENERAL_FIELDS if cell.name != f"without {name}"]
        return learn_apg(config, cell.seed, seconds, tuple(fields))
    algo = cell.name.partition("@")[0]
    if algo == "apg":
        return learn_apg(config, cell.seed, seconds)
    init = load_policy(cell.start) if cell.start else None
    env = PROBLEMS_ENV | {"problems": dict(config.problems), "episode_steps": config.decisions}
    return learn(Contender(algo=algo), env, cell.seed, seconds=seconds, init=init).policy


def _better(config: "ContestConfig", cell: Cell, last: Policy) -> Policy:
    """What a learner made of the policy that it began with, or that policy: by problems drawn for this choice."""
    judge = Judge(config, cell.seed, first=_CHOICE)
    assert cell.start is not None
    return max(load_policy(cell.start), last, key=lambda policy: judge.policy(policy)["share"])


def learn_apg(config: "ContestConfig", seed: int, seconds: float, fields: tuple[str, ...] = GENERAL_FIELDS) -> Policy:
    """apg for so many seconds of CPU time: as many batches as its first ones promise."""
    family = from_dict(ProblemFamily, config.problems, "problems")
    settings = apg.ApgConfig(seed=seed, fields=fields)
    settings = replace(settings, iterations=affordable(family, settings, seconds))
    learned = apg.learn(family, settings)
    return learned.actor.policy(config.decisions, family.probe_sequences, {"algo": "apg", "seed": seed})


def affordable(family: ProblemFamily, settings: apg.ApgConfig, seconds: float) -> int:
    """Batches that fit into so much CPU time, this trial of the speed included.

    A batch that is drawn anew takes longer than one that is kept; a trial with a small pool tells both.
    """
    marks = [time.process_time()]
    trial = replace(settings, iterations=_TRIAL, pool=1)
    apg.learn(family, trial, lambda row: marks.append(time.process_time()))
    times = np.diff(marks)
    kept, drawn = float(np.median(times)), float(np.sort(times)[-len(apg.widths(family)) :].mean())
    drawing = max(drawn - kept, 0.0)
    pool = settings.pool * len(apg.widths(family)) * drawing
    left = seconds - float(times.sum()) - pool
    return max(_TRIAL, int(left / (kept + apg.REFRESH * drawing)))


class Judge:
    """Problems that no learner met, what uniform and the best static mixture reach on them, and what others do."""

    def __init__(self, config: "ContestConfig", seed: int, first: int = _UNSEEN):
        self.config, self.seed = config, first + seed
        envs = self._environment({})
        assert isinstance(envs.runs, ProblemTrainer)
        self.problems = envs.runs.problems.tensors()
        self.best = apg.best_static(self.problems)[1]
        self.uniform = apg.static_objective(self.problems, apg.uniform(self.problems))

    def _environment(self, settings: dict[str, Any]) -> SurrogateVectorEnv:
        given: dict[str, Any] = {"problems": dict(self.config.problems), "episode_steps": self.config.decisions}
        envs = SurrogateVectorEnv(self.config.unseen, **{**PROBLEMS_ENV, **given, **settings})
        self.first, _ = envs.reset(seed=self.seed)
        return envs

    def policy(self, policy: Policy) -> dict[str, float]:
        """Score of a policy, every run with its own noise."""
        names = [name for name, _ in policy.fields]
        action = {"scale": policy.action.scale, "floor": policy.action.floor, "rate": policy.action.rate}
        own = [] if policy.domains else ["mask"]
        every = policy.decision_every
        envs = self._environment({"fields": [*names, *own], "action": action, "steps_per_action": every})
        layout = envs.observer.layout if own else ()
        observation = self.first
        for _ in range(-(-self.config.decisions // every)):
            action_taken = policy.act(*split_mask(observation, layout))
            observation, _, _, _, info = envs.step(action_taken)
        return self._score(torch.as_tensor(info["objective"]))

    def rules(self) -> dict[str, dict[str, float]]:
        """Fixed shares of the targets, and uniform; where no target can be trained on, a rule is uniform."""
        even = apg.uniform(self.problems)
        own = self.problems.weights * self.problems.trainable
        total = own.sum(-1, keepdim=True)
        targets = torch.where(total > 0, own / total.clamp(min=1e-9), even)
        mixtures = {"uniform": even, "best static": None} | {
            f"target share {share:g}": share * targets + (1 - share) * even for share in SHARES
        }
        return {
            name: self._score(self.best if mixture is None else apg.static_objective(self.problems, mixture))
            for name, mixture in mixtures.items()
        }

    def _score(self, objective: torch.Tensor) -> dict[str, float]:
        gain = self.uniform - self.best
        shares = ((self.uniform - objective) / gain)[gain > apg.LEAST_GAIN]
        return {"share": float(shares.mean()), "median": float(shares.median())}
