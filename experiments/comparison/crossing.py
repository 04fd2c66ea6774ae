"""How soon, and at what cost, a run gets as good as the reference ever gets."""

import math
from collections.abc import Sequence

import numpy as np

from acodm_env.experiments.comparison.load import Comparison, Run
from acodm_env.experiments.run.results import first_crossing
from acodm_env.step_stats import Array

BEFOREHAND = ("preparation", "learning")
"""Kinds of cost that are paid in full before the first step."""


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
