"""What a run is for: held-out targets, how much each counts, and whether losses or perplexities are averaged.

One formula serves rewards, mixers, tables, the surrogate and the learner that differentiates through it:

* ``loss``:       Σ_m ω_m L_m
* ``perplexity``: ln Σ_m ω_m e^{L_m}, the logarithm of the weighted mean perplexity

Both are in nats. Functions take the array module (numpy or torch) and any leading batch dimensions; a target that
weighs nothing may be unmeasured (NaN).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from acodm_env.errors import ConfigError, unknown

METRICS = ("loss", "perplexity")


def check_metric(metric: str) -> str:
    """The metric's name.

    Raises:
        ConfigError: it is none, with a suggestion.
    """
    if "=" in metric:
        raise ConfigError(f"objective={metric}: must be {' or '.join(METRICS)}; targets and weights go to --targets")
    if metric not in METRICS:
        unknown("objective", metric, METRICS)
    return metric


def value(losses: Any, weights: Any, perplexity: Any, xp: Any = np) -> Any:
    """Objective (…) in nats.

    Args:
        losses: (…, M) held-out losses in nats.
        weights: (…, M) ω, summing to 1.
        perplexity: whether perplexities are averaged: a truth value, or 0 and 1 (…, 1) where runs differ.
        xp: numpy or torch.
    """
    known = xp.where(weights > 0, losses, xp.zeros_like(losses))
    mean = (weights * known).sum(-1)
    if isinstance(perplexity, bool) and not perplexity:
        return mean
    log_mean = xp.log((weights * xp.exp(known)).sum(-1))
    if isinstance(perplexity, bool):
        return log_mean
    return xp.where(perplexity[..., 0] > 0.5, log_mean, mean)


def marginal(losses: Any, weights: Any, perplexity: Any, xp: Any = np) -> Any:
    """∂objective/∂L (…, M): what a nat less of each target is worth; ω, or ω e^L over its sum. Arguments as `value`."""
    known = xp.where(weights > 0, losses, xp.zeros_like(losses))
    if isinstance(perplexity, bool) and not perplexity:
        return weights
    heavy = weights * xp.exp(known)
    heavy = heavy / heavy.sum(-1)[..., None]
    if isinstance(perplexity, bool):
        return heavy
    return xp.where(perplexity > 0.5, heavy, weights)


def parse_targets(text: str | Mapping[str, float] | None) -> dict[str, float]:
    """Weights by target of "prose=2,licences=1"; a name alone counts 1; nothing where nothing was given.

    Raises:
        ConfigError: a target twice, or a weight that is not a number of at least 0.
    """
    if not text:
        return {}
    if isinstance(text, Mapping):
        return {name: weight(f"targets.{name}", given) for name, given in text.items()}
    weights: dict[str, float] = {}
    for part in filter(str.strip, text.split(",")):
        name, equals, given = (piece.strip() for piece in part.partition("="))
        if not name or name in weights:
            raise ConfigError(f"targets={text}: '{part.strip()}' must be name or name=weight, each target once")
        weights[name] = weight(f"targets.{name}", given if equals else 1.0)
    return weights


def weight(where: str, given: object) -> float:
    """A weight as a number.

    Raises:
        ConfigError: it is none of at least 0; `where` names it.
    """
    try:
        number = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ConfigError(f"{where}={given}: must be a finite weight of at least 0")
    return number


def normalised(targets: Mapping[str, float], known: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names and weights of targets, summing to 1.

    Args:
        targets: weights by name.
        known: names that there are.

    Raises:
        ConfigError: an unknown target, with a suggestion; a negative weight, or none that is positive.
    """
    for name, given in targets.items():
        if name not in known:
            unknown("targets.<name>", name, known)
        weight(f"targets.{name}", given)
    total = sum(targets.values())
    if total <= 0:
        raise ConfigError(f"targets={dict(targets)}: must hold a positive weight; all are 0")
    return tuple(targets), tuple(given / total for given in targets.values())


def describe(metric: str, weights: Mapping[str, float]) -> str:
    """An objective in words, such as "mean loss of prose ×2, licences".

    Args:
        metric: "loss" or "perplexity".
        weights: of the targets; none: all domains alike.
    """
    counted = {name: weight for name, weight in weights.items() if weight > 0}
    if len(counted) == 1:
        return f"{'loss' if metric == 'loss' else 'log perplexity'} of {next(iter(counted))}"
    what = "mean loss" if metric == "loss" else "log mean perplexity"
    if not counted:
        return f"{what} over all domains"
    ratios = {name: weight / min(counted.values()) for name, weight in counted.items()}
    return f"{what} of " + ", ".join(name if x < 1.005 else f"{name} ×{x:.3g}" for name, x in ratios.items())


def probe_counts(weights: Sequence[float], trained: Sequence[bool], budget: int) -> tuple[int, ...]:
    """Held-out sequences (M,) of each target in one cheap measurement of `budget` sequences in all.

    Only targets that weigh something are measured. Where fewer than `LEAST` sequences each would be left, those that
    are trained on are not: their training losses, which cost nothing, say as much.
    """
    wanted = [weight > 0 for weight in weights]
    if sum(wanted) * LEAST > budget:
        wanted = [one and not own for one, own in zip(wanted, trained, strict=True)]
    each = min(max(budget // max(sum(wanted), 1), min(LEAST, budget)), MOST)
    return tuple(each if one else 0 for one in wanted)


LEAST = 8
"""Fewest held-out sequences of a target from which something can be seen."""
MOST = 32
"""More sequences of one target show a policy nothing more."""
