"""Named reward terms (method: reward; the deviations from the paper are argued in `interaction.py`).

Per-domain terms r (K,) enter the scalar as Σ_i α_i r_i, global terms are added:

* ``interaction`` — r_i = Σ_{j≠i} H_ij / s, smoothed: how much domain i's gradient helps the others (the paper's).
* ``alignment``   — the same with the self term H_ii.
* ``progress``    — drop of the held-out objective between two decisions, optionally minus a uniform run's.
* ``final``       — minus the objective at the episode's end, optionally plus a uniform run's; wants γ = 1.

J(α) = Σ α_i r_i is linear in α, so its greedy maximiser is a corner of the simplex: floor, horizon and state keep
a policy inside. The objective is that of *validation* losses (`acodm_env.objective`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from acodm_env.config import from_dict
from acodm_env.errors import ConfigError, unknown
from acodm_env.observation import Observer
from acodm_env.step_stats import Array
from acodm_env.trainer import RunInfo


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Which terms, how heavy, and what the objective is."""

    terms: Mapping[str, float] = field(default_factory=lambda: {"interaction": 1.0})
    """Weight of each term."""
    objective: Mapping[str, float] | None = None
    """Weight of each held-out target in the objective; None: those of the run."""
    progress_over_uniform: bool = False
    """Subtract from `progress` what one uniform run gained between the same steps."""
    final_over_uniform: bool = False
    """Add to `final` the objective at the end of one uniform run: the return is then the gain over uniform in nats."""
    divergence_penalty: float = 10.0
    """Subtracted, once, when the language model diverges and the episode terminates; finite, ≥ 0."""

    def __post_init__(self) -> None:
        if not self.terms:
            raise ConfigError(f"reward={{}}: must name at least one of {', '.join(TERMS)}")
        for name, weight in self.terms.items():
            if name not in TERMS:
                unknown("reward", name, TERMS)
            if not np.isfinite(weight):
                raise ConfigError(f"reward.{name}={weight}: must be a finite weight")
        if not (np.isfinite(self.divergence_penalty) and self.divergence_penalty >= 0):
            raise ConfigError(f"divergence_penalty={self.divergence_penalty}: must be finite and at least 0")

    @property
    def needs(self) -> frozenset[str]:
        """What a trainer must measure for these terms."""
        return frozenset().union(*(TERMS[name].needs for name in self.terms))


def objective_weights(objective: Mapping[str, float] | None, info: RunInfo) -> Array:
    """Weights (M,) of the held-out targets, summing to 1; by default those of the run.

    Raises:
        ConfigError: an unknown target, a negative weight, or no weight at all.
    """
    if objective is None:
        return info.objective_weights
    for name in objective:
        if name not in info.targets:
            unknown("objective", name, info.targets)
    weights = np.array([float(objective.get(name, 0.0)) for name in info.targets])
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ConfigError(f"objective={dict(objective)}: must be non-negative with a positive sum")
    normalised: Array = weights / weights.sum()
    return normalised


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a reward is computed from, at the end of a decision window; arrays may have leading batch dimensions."""

    weights: Array
    """Mixture (K,) in effect."""
    observer: Observer
    objective_before: Array | float
    """Held-out objective at the previous decision, nats."""
    objective: Array | float
    """Held-out objective now, nats; only meaningful where a term needs "validation"."""
    uniform_drop: Array | float
    """The drop of the objective in the uniform run between the same steps, nats; 0 if not asked for."""
    ended: bool
    """The episode's last decision."""
    diverged: bool
    uniform_end: Array | float = 0.0
    """Objective at the end of the uniform run, nats; 0 if not asked for."""


@dataclass(frozen=True)
class Term:
    """One reward term; a row of `TERMS` is all that a new one takes."""

    needs: frozenset[str]
    """What a trainer must measure for it (`trainer.require`)."""
    value: Callable[[Outcome], Any]
    """r (…, K) of every domain, or a number of the whole run (…)."""
    per_domain: bool = False
    """Whether it is a reward for every domain, of which the scalar is the mean under the mixture."""


def _interaction(outcome: Outcome) -> Array:
    return outcome.observer.tracker.interaction


def _alignment(outcome: Outcome) -> Array:
    tracker = outcome.observer.tracker
    return tracker.interaction + tracker.self_term


def _progress(outcome: Outcome) -> Any:
    return outcome.objective_before - outcome.objective - outcome.uniform_drop


def _final(outcome: Outcome) -> Any:
    return outcome.uniform_end - outcome.objective if outcome.ended else 0.0


GRAM, VALIDATION = frozenset({"gram"}), frozenset({"validation"})
TERMS = {
    "interaction": Term(GRAM, _interaction, per_domain=True),
    "alignment": Term(GRAM, _alignment, per_domain=True),
    "progress": Term(VALIDATION, _progress),
    "final": Term(VALIDATION, _final),
}
"""Reward terms by name."""


def compute_terms(config: RewardConfig, outcome: Outcome) -> tuple[Any, Array, dict[str, Any]]:
    """Scalar reward (…), per-domain rewards r (…, K) and each term's contribution to the scalar.

    Per-domain rewards are the weighted sum of the per-domain terms alone; zero if there is none.
    """
    domain_rewards = np.zeros_like(outcome.weights)
    parts: dict[str, Any] = dict.fromkeys(config.terms, 0.0)
    if outcome.diverged:
        return -config.divergence_penalty, domain_rewards, parts
    for name, weight in config.terms.items():
        term = TERMS[name]
        value = term.value(outcome)
        if term.per_domain:
            domain_rewards += weight * value
            value = (outcome.weights * value).sum(-1)
        parts[name] = weight * value
    return sum(parts.values()), domain_rewards, parts


def parse_reward(reward: str | Mapping[str, Any]) -> RewardConfig:
    """A reward from a term's name, from {term: weight}, or from `RewardConfig`'s settings (with "terms")."""
    if isinstance(reward, str):
        return RewardConfig(terms={reward: 1.0})
    if "terms" in reward:
        return from_dict(RewardConfig, reward, "reward")
    return from_dict(RewardConfig, {"terms": reward}, "reward")
