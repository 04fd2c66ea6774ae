"""Mixers against each other, seed by seed, and how soon, at what cost, a run gets as good as the reference ever gets.

Runs of equal seeds start from the same model and see the same data, so their differences vary less than they do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.experiments.comparison import statistics
from acodm_env.experiments.comparison.load import Comparison, Run
from acodm_env.experiments.comparison.statistics import Interval
from acodm_env.experiments.run.results import first_crossing
from acodm_env.step_stats import Array

BEFOREHAND = ("preparation", "learning")
"""Kinds of cost that are paid in full before the first step."""

COMPARED = ("mean_loss_nats", "mean_perplexity")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mixer against a baseline on one metric, paired by seed; less is better."""

    mixer: str
    baseline: str
    metric: str
    interval: Interval
    """Of mixer − baseline."""
    p: float | None
    """Of a paired t test."""
    p_holm: float | None
    """The same, adjusted over every pair and metric that the summary compares."""
    verdict: str
    """"better" or "worse": the interval excludes 0; "no difference shown"; or "not decided": there is no interval."""
    note: str = ""
    """Why it is not decided, or which seeds are lacking."""


def values_of(runs: Sequence[Run], *keys: str) -> list[float] | None:
    """What the results of the runs that ended have under `keys`; None if one of them diverged."""
    values: list[float] = []
    for run in runs:
        found: Any = run.result
        if found is None:
            continue
        for key in keys:
            found = found[key]
        if run.status == "diverged" or found is None:
            return None
        values.append(float(found))
    return values


def baselines_of(comparison: Comparison, mixer: str) -> tuple[str, ...]:
    """What a mixer is compared with: uniform, the reference, its own time average, and a policy its untrained self."""
    wanted = ["uniform", comparison.reference, MEAN_OF + mixer]
    wanted += ["policy-untrained"] if mixer == "policy" else []
    return tuple(name for name in dict.fromkeys(wanted) if name in comparison.mixers and name != mixer)


def differences_of(comparison: Comparison, schedule: str) -> tuple[Difference, ...]:
    """Every comparison that is made under one schedule, with Holm's adjustment over all of them."""
    made = [
        _difference(comparison, schedule, mixer, baseline, metric)
        for mixer in comparison.mixers
        for baseline in baselines_of(comparison, mixer)
        for metric in dict.fromkeys((*COMPARED, comparison.primary))
    ]
    family = {_pair(one): one.p for one in made if one.p is not None}  # A − B and B − A are one comparison
    adjusted = dict(zip(family, statistics.holm(list(family.values())), strict=True))
    return tuple(replace(one, p_holm=adjusted.get(_pair(one))) for one in made)


def _pair(one: Difference) -> tuple[frozenset[str], str]:
    return frozenset((one.mixer, one.baseline)), one.metric


def _difference(comparison: Comparison, schedule: str, mixer: str, baseline: str, metric: str) -> Difference:
    mine, theirs = ({run.seed: run for run in comparison.select(name, schedule)} for name in (mixer, baseline))
    common = [seed for seed in mine if mine[seed].ended and seed in theirs and theirs[seed].ended]
    values = [values_of([runs[seed] for seed in common], metric) for runs in (mine, theirs)]
    first, second = values
    note = f"{len(common)} of {len(mine)} seeds" if len(common) < len(mine) else ""
    if first is None or second is None:
        interval, p = Interval(None, None, None, len(common), "no mean: a seed diverged"), None
        lost = [name for name, found in ((mixer, first), (baseline, second)) if found is None]
        note = " and ".join(f"{name} diverged" for name in lost)
    else:
        interval, p = statistics.paired_interval(first, second), statistics.paired_p_value(first, second)
    return Difference(
        mixer=mixer,
        baseline=baseline,
        metric=metric,
        interval=interval,
        p=p,
        p_holm=None,
        verdict=_verdict(interval),
        note=note,
    )


def _verdict(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return "not decided"
    if not interval.excludes_zero:
        return "no difference shown"
    return "better" if interval.high < 0 else "worse"


def steps_ratio(comparison: Comparison, run: Run) -> float | None:
    """Steps to the reference's best objective over the step at which the reference reached it.

    Where no objective was chosen it is the mean perplexity.
    The reference is the run of the same seed and schedule. Infinity if the run never gets there; what a run reached
    before it diverged counts. None if there is nothing to reach: the reference is not finished, diverged, or was
    never better than before its first step.
    """
    found = _crossing(comparison, run)
    return None if found is None else found[0] / found[1]


def cost_ratio(comparison: Comparison, run: Run, unit: str) -> float | None:
    """The same for the cost, end to end: what came beforehand, and the share of the run up to that step.

    preparation + learning + (training + measurement)·crossing/steps, over the same of the reference's own run. None
    also if a cost was not recorded.
    """
    found = _crossing(comparison, run)
    reference = comparison.run(comparison.reference, run.schedule, run.seed)
    if found is None or reference is None:
        return None
    own, theirs = (_cost_to(one, step, unit) for one, step in ((run, found[0]), (reference, found[1])))
    return None if own is None or not theirs else own / theirs


def _crossing(comparison: Comparison, run: Run) -> tuple[float, float] | None:
    """Steps at which `run` and its reference reach the reference's best level."""
    reference = comparison.run(comparison.reference, run.schedule, run.seed)
    if reference is None or reference.status != "finished":
        return None
    ref_steps, ref_level = _finite_curve(comparison, reference)
    if not len(ref_steps) or ref_steps[best := int(ref_level.argmin())] == 0:
        return None
    steps, level = _finite_curve(comparison, run)
    crossing = first_crossing(steps, level, float(ref_level[best]))
    return math.inf if crossing is None else crossing, float(ref_steps[best])


def _finite_curve(comparison: Comparison, run: Run) -> tuple[Array, Array]:
    level = comparison.level(run)
    kept = np.isfinite(level)
    if run.status == "diverged":
        kept[-1:] = False  # evaluated after the step that failed: not what the run leads to
    return run.steps[kept], level[kept]


def _cost_to(run: Run, step: float, unit: str) -> float | None:
    cost = (run.result or {}).get("cost")
    if not cost:
        return None
    before = sum(cost[kind][unit] for kind in BEFOREHAND)
    during = sum(cost[kind][unit] for kind in ("training", "measurement"))
    return float(before + during * step / run.steps[-1])


def cost_unit(runs: Sequence[Run]) -> str:
    """ "flops" if every part of every run that used tokens knows its FLOPs, else "tokens"."""
    parts = [part for run in runs for part in ((run.result or {}).get("cost") or {}).values()]
    known = [part["flops"] > 0 for part in parts if part["tokens"] > 0]
    return "flops" if known and all(known) else "tokens"
