"""The cells of `acodm regret`: one contender, or one baseline, on one split with one seed; each can be repeated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from acodm_env.agents.baselines import make_mixer
from acodm_env.agents.surrogate_learner import Contender, learn
from acodm_env.config import from_dict
from acodm_env.experiments.surrogate.playing import Conditions, play
from acodm_env.files import read_json, write_json
from acodm_env.policy.mixer import PolicyMixer, scaled_interval
from acodm_env.step_stats import Array
from acodm_env.surrogate.draws import Family
from acodm_env.surrogate.env import SurrogateConfig
from acodm_env.surrogate.oracle import best_schedule, best_static, final_objective
from acodm_env.surrogate.surface import Surface
from acodm_env.surrogate.trainer import SurrogateTrainer
from acodm_env.trainer import Mixer

SEEN, UNSEEN = "seen", "unseen"
REFERENCES = "references"
"""Cell of uniform, the optima and best-constant."""
_TEST, _TRAINING = 1, 2  # streams of surfaces


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells share."""

    surface: str
    family: Mapping[str, Any]
    """Settings of `Family` for the split `unseen`."""
    conditions: Conditions
    unseen: int
    """Unseen surfaces per seed."""
    training: int
    """Training surfaces behind `best-constant`."""
    env: Mapping[str, Any]
    """Settings of `SurrogateConfig` for all learners."""
    contenders: Mapping[str, Contender]
    baselines: Mapping[str, Mapping[str, Any]]
    """Options of the baselines by name."""

    def env_settings(self, split: str) -> dict[str, Any]:
        """Settings of the environment to learn on for a split."""
        family = {"family": dict(self.family)} if split == UNSEEN else {}
        steps = {"episode_steps": self.conditions.steps, "steps_per_action": self.conditions.steps_per_action}
        return {"surface": self.surface, **steps, "noise": self.conditions.noise, **self.env, **family}

    def surfaces(self, split: str, seed: int) -> list[Surface]:
        """What is judged on: the surface itself, or draws that no learner meets (their generators differ)."""
        if split == SEEN:
            return [SurrogateConfig(surface=self.surface).source().draw(np.random.default_rng(0))]
        rng = np.random.default_rng([_TEST, seed])
        return [self._family().draw(rng) for _ in range(self.unseen)]

    def training_surfaces(self, split: str, seed: int) -> list[Surface]:
        """What best-constant is fitted on."""
        if split == SEEN:
            return self.surfaces(SEEN, seed)
        rng = np.random.default_rng([_TRAINING, seed])
        return [self._family().draw(rng) for _ in range(self.training)]

    def _family(self) -> Family:
        return from_dict(Family, {"around": Surface.load(self.surface)} | dict(self.family), "family")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work."""

    name: str
    split: str
    seed: int
    folder: Path

    @property
    def file(self) -> Path:
        """Its result."""
        return self.folder / "cells" / f"{self.name}-{self.split}-{self.seed}.json"

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.file.exists()


def run_cell(setting: Setting, cell: Cell) -> None:
    """Do the work of a cell and write its result: {row name: {objective: [...], …}}."""
    import torch

    torch.set_num_threads(1)
    if cell.name == REFERENCES:
        rows = _references(setting, cell)
    elif cell.name in setting.contenders:
        rows = _contender(setting, cell)
    else:
        options = dict(setting.baselines[cell.name])
        rows = {cell.name: _played(setting, cell, lambda: make_mixer(cell.name, **options), setting.conditions)}
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    write_json(cell.file, rows)


def _references(setting: Setting, cell: Cell) -> dict[str, Any]:
    runs = _runs(setting, setting.surfaces(cell.split, cell.seed))
    rows = {
        "uniform": final_objective(runs, runs.mask / runs.mask.sum(-1, keepdims=True)),
        "best-schedule": best_schedule(runs).objective,
        "best-static": best_static(runs).objective,
    }
    training = setting.training_surfaces(cell.split, cell.seed)
    if len({surface.domains for surface in (*training, *runs.surfaces)}) == 1:  # else there is no common mixture
        constant = best_static(_runs(setting, training), shared=True).weights
        rows["best-constant"] = final_objective(runs, constant)
    return {name: {"objective": values.tolist()} for name, values in rows.items()}


def _runs(setting: Setting, surfaces: list[Surface]) -> SurrogateTrainer:
    """A batch of runs on the surfaces, a step per decision: static within it, so a decision is exact."""
    decisions = -(-setting.conditions.steps // setting.conditions.steps_per_action)
    return SurrogateTrainer(surfaces, horizon=decisions, noise=0.0, batch=(len(surfaces),))


def _contender(setting: Setting, cell: Cell) -> dict[str, Any]:
    learned = learn(setting.contenders[cell.name], setting.env_settings(cell.split), cell.seed)
    learned.policy.save(cell.folder / "policies" / f"{cell.name}-{cell.split}-{cell.seed}")
    policy = learned.policy
    interval = scaled_interval(policy, setting.conditions.steps)  # a contender may bring its own, and a lag
    conditions = replace(setting.conditions, steps_per_action=interval, lag=policy.lag)
    trained = _played(setting, cell, lambda: PolicyMixer(policy), conditions)
    before = _played(setting, cell, lambda: PolicyMixer(learned.untrained), conditions)
    cost = {"timesteps": learned.timesteps, "seconds": learned.seconds}
    return {
        cell.name: {"objective": trained["objective"]} | cost,
        f"mean-of:{cell.name}": {"objective": trained["mean_objective"]},
        f"untrained:{cell.name}": {"objective": before["objective"]},
    }


def _played(setting: Setting, cell: Cell, make: Callable[[], Mixer], conditions: Conditions) -> dict[str, Any]:
    """A mixer on every surface of the cell, and its time average as a static mixture."""
    surfaces = setting.surfaces(cell.split, cell.seed)
    plays = [play(make(), surface, conditions, cell.seed) for surface in surfaces]
    replays = [
        play(make_mixer("static", weights=_named(surface, one.mixture)), surface, conditions, cell.seed)
        for one, surface in zip(plays, surfaces, strict=True)
    ]
    return {"objective": [one.objective for one in plays], "mean_objective": [one.objective for one in replays]}


def _named(surface: Surface, mixture: Array) -> dict[str, float]:
    return dict(zip(surface.domains, mixture.tolist(), strict=True))


def read_cell(cell: Cell) -> dict[str, Any]:
    """The rows of a finished cell."""
    rows: dict[str, Any] = read_json(cell.file)
    return rows
