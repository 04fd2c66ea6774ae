"""Regret: the share of the best static mixture's gain over uniform that a row misses, per task and seed.

The best static mixture is, of all static rows of the task, the one with the least mean over the seeds of the *test*
objective: chosen with what it is then judged by, so it is a little better than a choice by validation would be, and
whoever is compared with it has the harder part. A task in which it gains less than `LEAST_GAIN` has no regret.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.experiments.benchmark.plan import Plan, is_dynamic
from acodm_env.experiments.benchmark.suite.tasks import Task
from acodm_env.experiments.comparison.load import Comparison, Run
from acodm_env.experiments.run.results import first_crossing
from acodm_env.objective import value
from acodm_env.step_stats import Array

LEAST_GAIN = 0.01
"""Nats below which a task has nothing to gain, and so no regret."""
UNIFORM, REFERENCE, BEST = "uniform", "odm-released", "best-static"
BySeed = dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a task shows. Values by row, then seed."""

    task: Task
    seeds: tuple[int, ...]
    objective: Mapping[str, BySeed]
    """Test objective at the end, nats; a run that diverged or is not there is left out."""
    validation: Mapping[str, BySeed]
    steps_to: Mapping[str, BySeed]
    """Steps to odm-released's best objective over those that it took; infinity: never."""
    flops_to: Mapping[str, BySeed]
    """The same of FLOPs: measurements on the way and runs made beforehand counted."""
    measurement: Mapping[str, BySeed]
    """FLOPs of measurements over those of training."""
    preparation: Mapping[str, BySeed]
    """FLOPs of runs made beforehand over those of training."""
    statics: tuple[str, ...]
    """Rows among which the best static mixture was chosen."""
    num_static_runs: int
    diverged: Mapping[str, int] = field(default_factory=dict)
    """Rows with diverged seeds, and how many."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Rows with at least one finished run."""
        return tuple(row for row, values in self.objective.items() if values)

    @property
    def best(self) -> str | None:
        """The static row with the least mean objective over the seeds that uniform has; None without uniform."""
        return best_static(self.objective, self.statics)

    @property
    def partial(self) -> tuple[str, ...]:
        """Static rows that lack a seed that uniform has."""
        seeds = self.objective.get(UNIFORM, {}).keys()
        return tuple(row for row in self.statics if not seeds <= self.objective[row].keys())

    @property
    def gain(self) -> float:
        """Nats by which it is better than uniform, mean over the seeds; 0 where that is unknown."""
        if self.best is None:
            return 0.0
        uniform = self.objective[UNIFORM]
        return float(np.mean([uniform[seed] - self.objective[self.best][seed] for seed in uniform]))

    @property
    def has_gain(self) -> bool:
        """Whether there is enough to gain for a regret."""
        return self.gain >= LEAST_GAIN

    def regret(self, row: str) -> BySeed:
        """(objective − best static's) / mean gain, by seed; nothing where there is no gain."""
        if not self.has_gain or self.best is None:
            return {}
        best = self.objective[self.best]
        return {
            seed: (own - best[seed]) / self.gain for seed, own in self.objective.get(row, {}).items() if seed in best
        }

    def behind(self, row: str) -> BySeed:
        """Objective − uniform's, nats, by seed."""
        uniform = self.objective.get(UNIFORM, {})
        return {seed: own - uniform[seed] for seed, own in self.objective.get(row, {}).items() if seed in uniform}


def best_static(objective: Mapping[str, BySeed], statics: Collection[str]) -> str | None:
    """The static row with the least mean over uniform's seeds; one that lacks a seed is none."""
    seeds = objective.get(UNIFORM, {})
    whole = [row for row in objective if row in statics and seeds.keys() <= objective[row].keys()]
    if not seeds or not whole:
        return None
    return min(whole, key=lambda row: float(np.mean([objective[row][seed] for seed in seeds])))


def outcome_of(task: Task, comparison: Comparison, plan: Plan, same: Mapping[str, str]) -> Outcome:
    """A task's outcome from its runs.

    Args:
        task: it.
        comparison: its runs.
        plan: its plan.
        same: rows whose mixture another row has, with that row's name: they share its runs.
    """
    runs: dict[str, list[Run]] = {row: list(comparison.select(row, plan.schedules[0])) for row in plan.mixers}
    runs |= {row: runs[twin] for row, twin in same.items() if twin in runs}
    statics = tuple(row for row in runs if row.startswith(MEAN_OF) or row in same or not is_dynamic(plan.entry(row)))
    finished = {row: [run for run in found if run.status == "finished"] for row, found in runs.items()}
    curves = {run.seed: _curve(comparison, run) for run in finished.get(REFERENCE, ())}
    found = Outcome(
        task=task,
        seeds=plan.seeds,
        objective={row: _of(each, "objective_nats") for row, each in finished.items()},
        validation={row: _of(each, "validation_objective_nats") for row, each in finished.items()},
        steps_to={row: _ratios(comparison, each, curves) for row, each in finished.items()},
        flops_to={row: _ratios(comparison, each, curves, flops=True) for row, each in finished.items()},
        measurement={row: {run.seed: _share(run, "measurement") for run in each} for row, each in finished.items()},
        preparation={row: {run.seed: _share(run, "preparation") for run in each} for row, each in finished.items()},
        statics=statics,
        num_static_runs=len({run.folder for row in statics for run in finished[row]}),
        diverged={row: n for row, each in runs.items() if (n := sum(run.status == "diverged" for run in each))},
    )
    return found if found.best is None else _with_best(found, found.best)


def _with_best(found: Outcome, best: str) -> Outcome:
    """The outcome with the best static mixture as a row of its own."""
    tables = ("objective", "validation", "steps_to", "flops_to", "measurement", "preparation")
    added: dict[str, Any] = {name: {**getattr(found, name), BEST: getattr(found, name)[best]} for name in tables}
    return replace(found, **added)


def _of(runs: Sequence[Run], key: str) -> BySeed:
    return {run.seed: float(run.result[key]) for run in runs if run.result and run.result.get(key) is not None}


def _share(run: Run, kind: str) -> float:
    """FLOPs of a kind over those of training."""
    cost = (run.result or {})["cost"]
    return float(cost[kind]["flops"] / cost["training"]["flops"])


def _curve(comparison: Comparison, run: Run) -> tuple[Array, Array]:
    """Steps (E,) and test objective (E,) of a run's evaluations."""
    perplexity = comparison.settings.get("metric") == "perplexity"
    return run.steps, np.asarray(value(run.losses, comparison.objective, perplexity))


def _ratios(
    comparison: Comparison, runs: Sequence[Run], reference: Mapping[int, tuple[Array, Array]], flops: bool = False
) -> BySeed:
    """Steps, or FLOPs, to the reference's best objective over those that it took, linear between evaluations."""
    found = {}
    for run in runs:
        if run.seed not in reference:
            continue
        their_steps, theirs = reference[run.seed]
        best = int(theirs.argmin())
        if their_steps[best] == 0:
            continue
        steps, curve = _curve(comparison, run)
        crossing = first_crossing(steps, np.exp(curve), float(np.exp(theirs[best])))
        needed = np.inf if crossing is None else crossing
        if flops:  # of training's steps; the reference measures nothing
            needed = needed * (1 + _share(run, "measurement")) + _share(run, "preparation") * float(steps[-1])
        found[run.seed] = needed / float(their_steps[best])
    return found
