"""How a row stands over all tasks: mean and worst regret, steps, measurements; and rows against each other, by seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.experiments.benchmark.suite.regret import BEST, UNIFORM, BySeed, Outcome
from acodm_env.experiments.benchmark.suite.rows import HALF, PAIR, TWICE, UNTRAINED, rules
from acodm_env.experiments.comparison.statistics import NO_SEEDS, Interval, mean_interval

GRID = (HALF, TWICE, PAIR)
"""How rows begin that are there for the best static mixture only."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A row over all tasks that have a gain."""

    row: str
    tasks: tuple[str, ...]
    """Tasks with a gain in which every seed of it is finished."""
    regret: Interval
    """Mean over those tasks, its interval over the seeds."""
    worst: float | None
    """Largest mean over the seeds."""
    worst_task: str
    steps_to: float | None
    """Median over targeted tasks and seeds; infinity: never."""
    flops_to: float | None
    """The same of FLOPs, measurements and preparations counted."""
    measurement: float
    """Mean share of the training's FLOPs."""
    preparation: float
    """The same of runs made beforehand."""


def rows_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Every row that is compared: rules, then policies; those that are there for the grid alone left out."""
    order = [entry.name for entry in rules()]
    names = dict.fromkeys(row for outcome in outcomes for row in outcome.rows)
    compared = [row for row in names if not row.startswith(GRID) and row != BEST]
    return [*sorted(compared, key=lambda row: order.index(row) if row in order else len(order)), BEST]


def policies_of(rows: Sequence[str]) -> list[str]:
    """Rows that are policies: they have an untrained twin or a time average, and are no bandits."""
    return [row for row in rows if row + UNTRAINED in rows or (MEAN_OF + row in rows and not row.startswith("odm-"))]


def standing(outcomes: Sequence[Outcome], row: str) -> Standing:
    """A row over the tasks with a gain."""
    whole = [one for one in outcomes if one.has_gain and {*one.seeds} <= one.regret(row).keys()]
    means = {one.task.name: float(np.mean([*one.regret(row).values()])) for one in whole}
    worst = max(means, key=lambda name: means[name], default="")
    have = [one for one in outcomes if row in one.rows]
    targeted = [one for one in have if one.task.is_targeted]
    steps = [ratio for one in targeted for ratio in one.steps_to[row].values()]
    flops = [ratio for one in targeted for ratio in one.flops_to[row].values()]
    return Standing(
        row=row,
        tasks=tuple(means),
        regret=over_seeds([one.regret(row) for one in whole]),
        worst=means.get(worst),
        worst_task=worst,
        steps_to=float(np.median(steps)) if steps else None,
        flops_to=float(np.median(flops)) if flops else None,
        measurement=_mean([share for one in have for share in one.measurement[row].values()]),
        preparation=_mean([share for one in have for share in one.preparation[row].values()]),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def over_seeds(tables: Sequence[BySeed]) -> Interval:
    """Mean over tasks, seed by seed, and its interval over the seeds that all of them have."""
    if not tables:
        return Interval(None, None, None, 0, NO_SEEDS)
    seeds = set.intersection(*({*table} for table in tables))
    return mean_interval([float(np.mean([table[seed] for table in tables])) for seed in sorted(seeds)])


def paired(outcomes: Sequence[Outcome], row: str, other: str) -> tuple[Interval, int]:
    """Regret of a row minus another's, paired by seed, over the tasks that both have; and how many those are."""
    both = [one for one in outcomes if one.has_gain and row in one.rows and other in one.rows]
    deltas = []
    for one in both:
        mine, theirs = one.regret(row), one.regret(other)
        deltas.append({seed: mine[seed] - theirs[seed] for seed in mine.keys() & theirs.keys()})
    return over_seeds(deltas), len(both)


def is_rule(row: str) -> bool:
    """Whether a row is a single fixed rule that needs no run beforehand: a share of the targets, or by size."""
    return row == "proportional" or row.startswith("share-")


def best_rule(outcomes: Sequence[Outcome]) -> Standing | None:
    """The fixed rule with the least mean regret, of those with the most tasks."""
    found = [standing(outcomes, row) for row in rows_of(outcomes) if is_rule(row)]
    most = max((len(each.tasks) for each in found), default=0)
    whole = [each for each in found if each.regret.mean is not None and len(each.tasks) == most]
    return min(whole, key=lambda each: each.regret.mean or 0.0, default=None)


def opponents(rows: Sequence[str], policy: str, rule: str) -> list[str]:
    """What a policy is compared with: the best fixed rule, uniform, both bandits, its untrained twin, its average."""
    wanted = (rule, UNIFORM, "odm-released", "odm-released-rescaled", policy + UNTRAINED, MEAN_OF + policy)
    return [name for name in wanted if name in rows]
