"""How the domains' gradients interact: the statistic behind AC-ODM's reward and two observation fields.

The paper's W_i = ⟨∇ℓ_i, Σ_{j≠i} ∇ℓ_j⟩ (arXiv 2505.23878, reward) is the off-diagonal row sum of the Gram matrix H
of the domains' mean gradients. Two deviations, both of which make it comparable over time and models:

* it is divided by s, a running mean of the *past* tr(H)/K from the unbiased diagonal: a norm of the current
  window would make the reward depend on the mixture through sampling noise;
* the importance weight 1/α_i is off by default: in Σ_i α_i·(W_i/α_i) it cancels the action from the reward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acodm_env.errors import ConfigError
from acodm_env.step_stats import Array, StepStats


@dataclass(frozen=True, kw_only=True)
class InteractionConfig:
    """Smoothing of the interaction statistic."""

    smoothing: float = 0.7
    """ξ in r ← ξ·r + (1−ξ)·W/s, in [0, 1). The paper gives no value; measured noise asks for one above 0.5."""
    scale_smoothing: float = 0.9
    """The same for the scale s."""
    importance_weighted: bool = False
    """Divide W_i by α_i, as in the paper. Cancels the action from the scalar reward."""

    def __post_init__(self) -> None:
        for name in ("smoothing", "scale_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be in [0, 1)")


class InteractionTracker:
    """Running, scale-free view of the Gram matrix, one update per decision window."""

    def __init__(self, num_domains: int, config: InteractionConfig | None = None, batch: tuple[int, ...] = ()):
        self.config = config or InteractionConfig()
        self.interaction: Array = np.zeros((*batch, num_domains))
        """(…, K) smoothed W_i / s, within ±2K."""
        self.self_term: Array = np.zeros((*batch, num_domains))
        """(…, K) smoothed H_ii / s, within ±2K."""
        self._diagonal: Array = np.full((*batch, num_domains), np.nan)  # last unbiased ‖g_i‖² seen per domain
        self._scale: Array = np.zeros((*batch, 1))  # 0 as long as there is none

    @property
    def log_norm(self) -> Array:
        """(…, K) ½·ln(‖g_i‖² / s): a domain's gradient norm against the running mean; 0 before it is known."""
        known = np.isfinite(self._diagonal) & (self._scale > 0)
        ratio = np.divide(self._diagonal, self._scale, out=np.ones_like(self._diagonal), where=known)
        log_norm: Array = 0.5 * np.log(np.maximum(ratio, 1e-3))
        return log_norm

    def update(self, window: StepStats, values: Array | None = None) -> None:
        """Take in one decision window; domains absent from it keep their last values.

        Args:
            window: the steps since the last decision.
            values: (…, K) what a nat of each domain's loss is worth, 1 on average. With it W_i is Σ_j v_j⟨∇ℓ_i, ∇ℓ_j⟩,
                the domain itself included; without, the paper's.
        """
        if window.gradients is None or window.diverged:
            return
        gram, noise = window.gradients.gram()
        diagonal = np.diagonal(gram, axis1=-2, axis2=-1)  # (…, K)
        off_diagonal = np.where(np.eye(gram.shape[-1], dtype=bool), 0.0, gram)
        present = window.counts > 0
        pull = np.where(present, np.nansum(off_diagonal, axis=-1), np.nan)  # (…, K) W_i
        whole = (np.isfinite(pull) | ~present).all(-1, keepdims=True)  # (…, 1)
        if values is not None:
            pull = np.where(present, aligned(gram, values), np.nan)
        usable = whole & (self._scale > 0)
        scale = np.where(usable, self._scale, 1.0)
        self._smooth(self.interaction, pull / self._importance(window.requested) / scale, usable)
        self._smooth(self.self_term, diagonal / scale, usable)
        self._rescale(np.where(whole, diagonal, np.nan), noise)

    def _importance(self, weights: Array) -> Array | float:
        return np.maximum(weights, 1e-6) if self.config.importance_weighted else 1.0

    def _smooth(self, running: Array, value: Array, usable: NDArray[np.bool_]) -> None:
        keep = self.config.smoothing
        limit = 2.0 * running.shape[-1]
        known = np.isfinite(value) & usable
        running[known] = np.clip(keep * running[known] + (1 - keep) * value[known], -limit, limit)

    def _rescale(self, diagonal: Array, noise: Array) -> None:
        self._diagonal = np.where(np.isfinite(diagonal), diagonal, self._diagonal)
        # The unbiased trace can be negative by noise; the (noisy) norm bounds it away from zero.
        noisy = _mean(diagonal + noise, np.isfinite(noise) & np.isfinite(diagonal))
        trace = np.maximum(_mean(self._diagonal, np.isfinite(self._diagonal)), 1e-2 * noisy)  # (…, 1)
        keep = np.where(self._scale > 0, self.config.scale_smoothing, 0.0)
        self._scale = np.where(trace > 0, keep * self._scale + (1 - keep) * trace, self._scale)

    def state_dict(self) -> dict[str, Any]:
        """All running values."""
        return {
            "interaction": self.interaction.copy(),
            "self_term": self.self_term.copy(),
            "diagonal": self._diagonal.copy(),
            "scale": self._scale.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self.interaction = np.array(state["interaction"], dtype=np.float64)
        self.self_term = np.array(state["self_term"], dtype=np.float64)
        self._diagonal = np.array(state["diagonal"], dtype=np.float64)
        self._scale = np.array(state["scale"], dtype=np.float64)


def aligned(gram: Array, values: Array) -> Array:
    """Σ_j v_j H_ij (…, K); NaN where an entry that counts is unknown."""
    alignment: Array = np.where(values[..., None, :] > 0, gram * values[..., None, :], 0.0).sum(-1)
    return alignment


def _mean(values: Array, known: NDArray[np.bool_]) -> Array:
    """(…, 1) mean over the known entries of (…, K); 0 where there is none."""
    total: Array = np.where(known, values, 0.0).sum(-1, keepdims=True) / np.maximum(known.sum(-1, keepdims=True), 1)
    return total
