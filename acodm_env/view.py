"""The problem as a policy for any problem sees it: one row for every domain, and for every target that is none.

Each number is one formula for the text run, the surrogate, and the learner that differentiates through it: numpy and
torch, any leading batch dimensions. Amounts of data are counted in *uniform shares*: 1 is what the uniform mixture over
the domains that can be trained on draws from each in the whole run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from acodm_env.objective import marginal

CLIP_SLOPE = 2.0
SMOOTHING = 0.5
"""Share of the newest slope in `View.slopes`."""
_START = 0.05  # of the run: keeps logarithms of time finite at its start
_LEAST = 0.05  # uniform shares, likewise


class Affinity(Protocol):
    """What is known of domains and targets before the run, computed when asked for; see `acodm_env.corpus.affinity`."""

    def matrix(self) -> Any:
        """(M, K) from −2 to 2: how near each domain lies to each target."""

    def leverage(self) -> Any:
        """(K,) nats that each domain's own loss is likely to fall per e-fold of its share."""


@dataclass(kw_only=True)
class View:
    """What is known at a decision; arrays (…, R) unless said."""

    weights: Any
    """ω of each row in the objective, summing to 1."""
    perplexity: Any
    """1 where perplexities are averaged, 0 where losses are (…, 1)."""
    losses: Any
    """Held-out loss of a target that is measured; else the training loss; nats; ln V before the first."""
    previous: Any
    """The same at the decision before."""
    gaps: Any
    """Held-out less training loss of a target that is measured and trained on, nats; else 0."""
    slopes: Any
    """−ΔL / Δ ln(time) between decisions, smoothed, nats; see `slope`."""
    drawn: Any
    """Sequences drawn so far over those of the whole run."""
    sizes: Any
    """Sequences that there are over those of the whole run; 0 where there is nothing to train on."""
    mixture: Any
    """In force; 0 where there is nothing to train on."""
    trainable: Any
    """1 for a domain that can be trained on, else 0."""
    affinity: Any
    """Σ_m ω_m a_mj: how near the row lies to the targets, −2 to 2 (`corpus.affinity`); 0 for a mere target."""
    leverage: Any
    """−∂L/∂ln(share) of each domain by counts of token pairs, nats (`corpus.affinity`); 0 where unknown."""
    present: Any
    """1 for a row, 0 for padding."""
    progress: Any
    """Share of the run done (…, 1)."""
    initial: float
    """ln V, nats."""

    @property
    def count(self) -> Any:
        """Rows (…, 1), without padding."""
        return self.present.sum(-1)[..., None]

    @property
    def choices(self) -> Any:
        """Domains that can be trained on (…, 1)."""
        return self.trainable.sum(-1)[..., None]


def slope(losses: Any, previous: Any, smoothed: Any, progress: Any, earlier: Any, xp: Any) -> Any:
    """The next smoothed slope (…, R): nats per e-fold of the run's tokens between two decisions.

    Args:
        losses: (…, R) now.
        previous: (…, R) at the decision before.
        smoothed: (…, R) the slope so far.
        progress: share of the run done, now.
        earlier: the same at the decision before; 0 takes the new slope as it is.
        xp: numpy or torch.
    """
    newest = (previous - losses) / math.log((progress + _START) / (earlier + _START))
    newest = xp.clip(newest, -CLIP_SLOPE, CLIP_SLOPE)
    return newest if earlier == 0 else SMOOTHING * newest + (1 - SMOOTHING) * smoothed


Formula = Callable[[View, Any], Any]


def _passes(view: View, xp: Any) -> Any:
    return xp.where(view.sizes > 0, view.drawn / xp.clip(view.sizes, 1e-9, None), xp.zeros_like(view.drawn))


PER_ROW: dict[str, tuple[str, float, float, Formula]] = {
    "objective_weight": (
        "ln(1 + ω K): how much the row counts in the objective",
        0.0,
        4.0,
        lambda v, xp: xp.log1p(v.weights * v.count),
    ),
    "marginal_value": (
        "ln(1 + K ∂objective/∂L): what a nat less of it is worth now",
        0.0,
        4.0,
        lambda v, xp: xp.log1p(v.count * marginal(v.losses, v.weights, v.perplexity, xp)),
    ),
    "domain_loss": (
        "held-out loss of a target that is measured, else training loss, over ln V",
        0.0,
        2.0,
        lambda v, xp: v.losses / v.initial,
    ),
    "domain_progress": (
        "its drop since the previous decision, three times, nats",
        -3.0,
        3.0,
        lambda v, xp: xp.clip(3 * (v.previous - v.losses), -3.0, 3.0),
    ),
    "elasticity": (
        "−ΔL / Δ ln(time) between decisions, smoothed, nats",
        -CLIP_SLOPE,
        CLIP_SLOPE,
        lambda v, xp: v.slopes,
    ),
    "gap": (
        "held-out less training loss where both are measured, nats: over-fitting",
        -1.0,
        3.0,
        lambda v, xp: xp.clip(v.gaps, -1.0, 3.0),
    ),
    "drawn": (
        "ln of the data drawn so far, in uniform shares",
        -4.0,
        4.0,
        lambda v, xp: xp.log(v.drawn * v.choices + _LEAST),
    ),
    "passes": ("ln(1 + e) of the passes e over it", 0.0, 6.0, lambda v, xp: xp.log1p(_passes(v, xp))),
    "size": (
        "ln of the data that there is, in uniform shares, halved",
        -2.0,
        1.5,
        lambda v, xp: xp.clip(xp.log(xp.clip(v.sizes * v.choices, 1e-9, None)), -4.0, 3.0) / 2,
    ),
    "mixture": (
        "ln of its weight in force over an even one",
        -3.0,
        4.0,
        lambda v, xp: xp.log(v.mixture * v.choices + _LEAST),
    ),
    "affinity": (
        "how near its text lies to the targets', by counts of token pairs",
        -2.0,
        2.0,
        lambda v, xp: v.affinity,
    ),
    "leverage": (
        "nats that its loss is to fall per e-fold of its share, by counts of token pairs, five times",
        0.0,
        4.0,
        lambda v, xp: xp.clip(5 * v.leverage, 0.0, 4.0),
    ),
    "trainable": ("1 where it can be trained on, 0 for a mere target", 0.0, 1.0, lambda v, xp: v.trainable),
}
"""Per row: name, (meaning, lowest, highest, formula)."""

PER_RUN: dict[str, tuple[str, float, float, Formula]] = {
    "perplexity": ("1 if the objective averages perplexities, 0 if losses", 0.0, 1.0, lambda v, xp: v.perplexity),
    "num_rows": ("ln of the number of rows, less 2", -2.0, 6.0, lambda v, xp: xp.log(v.count) - 2),
}
"""Per run, likewise."""

GENERAL_FIELDS: tuple[str, ...] = (*PER_ROW, "progress", *PER_RUN)
"""What a policy for any problem reads."""
