"""Where a policy for any problem may be trusted: what it was trained for, what it must see, and what to do elsewhere.

An exported policy may declare its training support in its provenance, `{"support": {"num_rows": [3, 24], …}}`. A run
outside of it is driven by the nearest fixed rule instead, and whoever drives it says so.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import PolicyError
from acodm_env.objective import describe, parse_targets
from acodm_env.step_stats import Array
from acodm_env.trainer import RunInfo
from acodm_env.view import PER_ROW

SHARES = (1.0, 0.7, 0.5, 0.3)
"""Shares of the targets in the fixed rules, the largest first."""
MOST_PASSES = 20.0
"""Passes over a target domain beyond which no fixed share is taken."""
MOST_OVERFIT = 5.0
"""Largest passes × share² of a target domain under a fixed rule.

With 8 domains, one of them the target, and runs of 400 × 16 sequences: .7 was best at 640 sequences (passes × share²
3.4; 10 at share 1), .3 and .5 at 160 (1.1 and 5; 13.7 at .7), uniform at 40, where .3 has 48 passes.
"""
SEES: dict[str, tuple[str, ...]] = {
    "targets of unequal weight": ("objective_weight", "marginal_value"),
    "a mean of perplexities": ("perplexity", "marginal_value"),
    "targets that are not trained on": ("trainable", "size"),
}
"""What a run may ask for, and the fields of `acodm_env.view` of which one shows it."""


def outside(support: Mapping[str, Any], info: RunInfo) -> list[str]:
    """What of a run lies outside of a policy's training support, in words; [] if nothing does.

    Args:
        support: [lowest, highest] by quantity, each possibly None: `num_rows` (domains, and targets that are none),
            `decisions` of the run, `steps_per_decision`. Others decide nothing here.
        info: the run.
    """
    here = {
        "num_rows": (len(info.rows) - info.padding, "domains and targets"),
        "decisions": (-(-info.horizon // info.decision_every), "decisions"),
        "steps_per_decision": (info.decision_every, "optimiser steps per decision"),
    }
    return [
        f"{number} {words}, it is meant for {_range(*support[name])}"
        for name, (number, words) in here.items()
        if name in support and not _within(number, *support[name])
    ]


def unusual(support: Mapping[str, Any], info: RunInfo) -> list[str]:
    """Domains smaller than any that the policy learned with, in words: they are seen as the smallest, and it goes on.

    Args:
        support: `sizes`, [lowest, highest] in uniform shares of the run.
        info: the run.
    """
    lowest = (support.get("sizes") or [None])[0]
    if lowest is None:
        return []
    return [
        f"{name} holds {size:.2g} of what uniform draws from it, it learned with {lowest:g} or more"
        for name, size in zip(info.domains, uniform_shares(info), strict=True)
        if 0 < size < lowest
    ]


def uniform_shares(info: RunInfo) -> Array:
    """(K,) sequences of each domain over those that the uniform mixture draws from it in the whole run."""
    run = info.horizon * info.batch_size * info.sequence_length
    shares: Array = np.array(info.sizes_tokens, dtype=np.float64) * (info.num_domains - info.padding) / run
    return shares


def _within(number: float, low: float | None, high: float | None) -> bool:
    return (low is None or number >= low) and (high is None or number <= high)


def _range(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{high:g} or fewer" if low is None else f"{low:g} or more"
    return f"{low:g} to {high:g}"


# --- fixed rules --------------------------------------------------------------------------------------------


def target_share(info: RunInfo, share: float) -> Array:
    """Mixture (K,) with so large a share of the trained targets, by their weights, the rest evenly over the others.

    Where every domain counts, the rest is even over all; where no target is trained on, everything is.
    """
    own, real = own_weights(info), _real(info)
    if own.sum() == 0:
        even: Array = real / real.sum()
        return even
    others = real & (own == 0)
    rest = others if others.any() else real
    mixture: Array = share * own / own.sum() + (1 - share) * rest / rest.sum()
    return mixture


def nearest_rule(info: RunInfo) -> tuple[str, Array]:
    """Name and mixture (K,) of the fixed rule that a run is given where no policy may be trusted.

    Uniform where all domains count alike, or none of the targets is trained on; else the largest share of the targets
    with which none of them is passed over too often (`MOST_PASSES`, `MOST_OVERFIT`), uniform if none is.
    """
    own, real = own_weights(info), _real(info)
    if own.sum() == 0 or (np.ptp(own[real]) < 1e-9 and own.sum() > 1 - 1e-9):
        return "uniform", real / real.sum()
    run, sizes = info.horizon * info.batch_size * info.sequence_length, np.maximum(info.sizes_tokens, 1)
    everything = own.sum() > 1 - 1e-9  # else something must be left for the targets that are not trained on
    for share in SHARES if everything else SHARES[1:]:
        mixture = target_share(info, share)
        passes = np.where(own > 0, mixture * run / sizes, 0.0)
        if passes.max() <= MOST_PASSES and (passes * mixture**2).max() <= MOST_OVERFIT:
            return f"target-share {share:g}", mixture
    return "uniform", real / real.sum()


def own_weights(info: RunInfo) -> Array:
    """(K,) weight of each domain as a target of the objective; 0 where it is none."""
    weights = dict(zip(info.targets, info.objective_weights.tolist(), strict=True))
    return np.array([weights.get(name, 0.0) for name in info.domains])


def _real(info: RunInfo) -> NDArray[np.bool_]:
    """(K,) whether a domain is no padding."""
    real: NDArray[np.bool_] = np.arange(info.num_domains) < info.num_domains - info.padding
    return real


# --- objectives ---------------------------------------------------------------------------------------------


def check_sees(fields: Sequence[str], info: RunInfo) -> None:
    """Refuse a policy for any problem, one with fields of `acodm_env.view`, that cannot see what this one asks for.

    Args:
        fields: names of those that the policy reads.
        info: the run.

    Raises:
        PolicyError: it cannot; names the fields by which it could.
    """
    alike = len({*np.round(info.objective_weights, 12).tolist()}) == 1 and {*info.targets} == {*info.domains}
    asked = {
        "targets of unequal weight": not alike,
        "a mean of perplexities": info.metric == "perplexity",
        "targets that are not trained on": bool({*info.targets} - {*info.domains}),
    }
    for what, needed in SEES.items():
        if asked[what] and {*PER_ROW} & {*fields} and not {*needed} & {*fields}:
            raise PolicyError(
                f"fields={','.join(fields)}: must hold {' or '.join(needed)} for a run with {what}; they were switched "
                f"off when the policy was learned; take one that sees them, such as generalist"
            )


def learned_for(provenance: Mapping[str, Any], fields: Collection[str], info: RunInfo) -> str:
    """The objective that a policy was learned for, in words, if it is another than the run's; else "".

    A policy that sees the objective is for any; one whose provenance says nothing is taken as it is.

    Args:
        provenance: of the policy.
        fields: names of the fields that it reads.
        info: the run.
    """
    config = provenance.get("config") or {}
    if not config or config.get("surrogate") or {"objective_weight", "marginal_value"} & {*fields}:
        return ""
    metric, targets = recorded_objective(config)
    weights = dict(zip(info.targets, info.objective_weights.tolist(), strict=True))
    wanted = targets or dict.fromkeys(info.domains, 1 / max(info.num_domains, 1))
    names = {*wanted, *weights}
    same = all(abs(wanted.get(name, 0.0) - weights.get(name, 0.0)) < 1e-9 for name in names)
    return "" if same and metric == info.metric else describe(metric, targets)


def recorded_objective(config: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """Metric and normalised weights that a run's settings name; {}: all domains alike."""
    targets, objective = config.get("targets"), config.get("objective")
    if isinstance(targets, list):  # of a co-trained run
        return str(config.get("metric", "loss")), dict(zip(targets, objective or (), strict=False))
    weights = parse_targets(targets)
    total = sum(weights.values()) or 1.0
    metric = objective if isinstance(objective, str) else "loss"
    return metric, {name: weight / total for name, weight in weights.items() if weight > 0}
