"""Mixers against each other, seed by seed.

Runs of equal seeds start from the same model and see the same data, so their differences vary less than they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from acodm_env.agents.baselines.recorded import MEAN_OF
from acodm_env.experiments.comparison import statistics
from acodm_env.experiments.comparison.load import Comparison, Run
from acodm_env.experiments.comparison.statistics import Interval

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
